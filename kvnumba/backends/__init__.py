"""One folder or module a backend; nothing here is imported before the registry is asked for it."""
