"""Training beside PEFT + TRL."""
