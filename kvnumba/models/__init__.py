"""Models in NumPy whose keys and values live in the caches."""
