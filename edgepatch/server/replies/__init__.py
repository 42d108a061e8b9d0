"""From the pieces of each choice to what goes out: one writer an endpoint, over what a reply may hold and what of it may stream."""
