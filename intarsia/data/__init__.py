"""Text: from named sources to pinned token sequences."""
