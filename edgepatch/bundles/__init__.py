"""Bundles: one tar with everything that a machine without a network needs, and what takes it in there.

``archive`` is the file, ``contents`` what may be in it; ``wheels``, ``inventory`` and ``notes`` make the parts, ``creation`` puts
them together, ``acceptance`` verifies all of it before anything on the device is touched.
"""
