"""A run out as servers read it, and a published draft in."""
