"""What is told about a finished model."""
