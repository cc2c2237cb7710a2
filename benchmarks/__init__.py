"""Measurements of fedrounds; not installed with it."""
