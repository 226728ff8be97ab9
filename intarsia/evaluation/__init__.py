"""Evaluation: scores of models with their uncertainty, settings and hashes."""
