"""Pruning methods, one file a method."""
