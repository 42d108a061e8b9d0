"""The first load of a model: what its proof costs, and what becomes of forged files."""
