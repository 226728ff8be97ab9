"""The verbs, one file each: a pipeline that is read from top to bottom."""
