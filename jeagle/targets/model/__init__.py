"""The target as a Flax module: its specification, layers, features and generation."""
