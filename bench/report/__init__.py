"""Results as pages, tables and pictures, and the gate that compares them."""
