"""Checkpoints whose weights are quantised."""
