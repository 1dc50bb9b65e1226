"""A target's files: where they are, how they are read, and how they come to lie on the mesh."""
