"""lm-eval's tasks on any runtime."""
