"""The caches that users hold."""
