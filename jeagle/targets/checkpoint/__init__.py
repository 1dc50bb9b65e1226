"""A target's files: where they are, how they are read, and how their weights are loaded onto the mesh."""
