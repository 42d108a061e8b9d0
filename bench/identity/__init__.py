"""Which models does a patch fit?"""
