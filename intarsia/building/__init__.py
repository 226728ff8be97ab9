"""Building: from a recipe to a model."""
