"""Checkpoints: finding, reading, hashing and writing model folders."""
