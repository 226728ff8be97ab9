"""Healing of pruned models: closed form and distillation."""
