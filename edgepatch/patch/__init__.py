"""The patch: its file, its canonical form, the sketch and the canary in it, its card."""
