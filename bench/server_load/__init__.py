"""A server under load: are all replies there, patched and in time, and how many tokens a second does it give?"""
