"""What llama.cpp keeps of a sequence, and in which order."""
