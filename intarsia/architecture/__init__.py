"""The structure of layers: model families as data."""
