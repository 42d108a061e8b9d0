"""A patch for clients that are not ours: one folder a client, and the proof that the client answers with the patch."""
