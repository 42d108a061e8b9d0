"""Between text and tokens: conversations, templates, tokenizers, calls of tools."""
