"""How good a model is: scores with their uncertainty, settings and hashes."""
