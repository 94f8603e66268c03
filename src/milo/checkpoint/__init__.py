"""Checkpoints: reading a source lazily, saying what is in it, writing and reading the compressed format."""
