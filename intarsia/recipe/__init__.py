"""Recipes: the full description of an output model."""
