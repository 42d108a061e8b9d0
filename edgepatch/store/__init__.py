"""The patches of a device: which ones are active for each model, who vouches for it, and what happened before.

``files`` touches the disk, ``records`` is what lies there, ``history`` the chained record of what was done, ``policy`` decides.
``slots`` are the places of several patches beside each other. ``reading`` is the store as runtimes see it, ``device`` changes it, ``audit`` checks it.
"""
