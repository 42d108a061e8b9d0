"""``bench``: every measurement behind one door, a verb each. A module a group of verbs; each registers its own with ``door.bench_app``."""
