"""Tensors at rest: reading and writing model folders."""
