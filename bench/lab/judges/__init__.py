"""The two toxicity judges: trained, measured, described."""
