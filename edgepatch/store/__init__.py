"""The patches of a device: which one is active for each model, who vouches for it, and what happened before.

``files`` touches the disk, ``records`` is what lies there, ``history`` the chained record of what was done, ``policy`` decides.
``reading`` is the store as runtimes see it, ``device`` changes it, ``audit`` checks it.
"""
