"""The real clients of every export: installed, asked, and compared with our own runtime."""
