"""From what names a text to pinned token sequences."""
