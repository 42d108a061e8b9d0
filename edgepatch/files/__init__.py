"""Files and what JSON says in them: bounded reading of what others wrote, writing that is whole or not at all, one strict JSON."""
