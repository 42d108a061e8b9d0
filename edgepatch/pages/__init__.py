"""Every HTML page: blocks and charts as values, one template, one style."""
