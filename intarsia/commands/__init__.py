"""The verbs, one file each: what `intarsia VERB` does, from top to bottom."""
