"""What a file or folder is, and what a model in it is made of: read from headers and JSON alone, without a model library."""
