"""Rules of our own: each is one class, found by fedrounds through the entry points in pyproject.toml."""
