"""Search over recipes for a family of fine-tuned models."""
