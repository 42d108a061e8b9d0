"""Models of real sizes with random weights, and the machine that they run on."""
