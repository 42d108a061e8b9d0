"""The trust root: whose signatures count for what, and how that changes on a machine without a network.

Modelled on the root role of The Update Framework (TUF 1.0.33, section 5.3): one file, signed by its own root keys and by
those of the version before it. ``roots`` is the value and its file, ``verification`` decides, ``drafts``
makes new ones.
"""
