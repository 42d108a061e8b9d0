"""The judges: trained, measured, set beside each other, described."""
