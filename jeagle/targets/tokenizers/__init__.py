"""Tokenizers of every form that checkpoints bring."""
