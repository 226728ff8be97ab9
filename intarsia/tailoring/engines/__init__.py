"""Search engines, one file an engine."""
