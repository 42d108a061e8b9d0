"""What a safety patch is for: one module a domain, each with its prompts, its preference pairs and its measure."""
