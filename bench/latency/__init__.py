"""What a patch costs, against everything a user would take instead."""
