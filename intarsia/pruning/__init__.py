"""Planners, and the loop that takes their steps."""
