"""Will signs work for my model? Geometry of gradients, what the papers prove, and advice."""
