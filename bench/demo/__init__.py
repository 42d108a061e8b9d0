"""The main job on the lab model, in one command: a small evidence matrix of one patch, with its times."""
