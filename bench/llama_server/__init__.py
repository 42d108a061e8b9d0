"""An unmodified llama-server beside our own runtime."""
