"""Passes through the layers, and attention over several parts of the keys."""
