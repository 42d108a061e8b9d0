"""Every kind of page in a real browser: does it fit a phone, can its pictures be read, does it say at once what it is about."""
