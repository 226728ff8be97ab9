"""Heal stages, one file each: a function of context, recipe and settings that gives a recipe."""
