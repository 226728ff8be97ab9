"""Models of which no family file describes the layers: what `transformers` knows of them, and small ones to try."""
