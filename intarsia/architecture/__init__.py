"""What a layer is made of: model families as data."""
