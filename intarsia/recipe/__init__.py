"""What we want: the full description of an output model."""
