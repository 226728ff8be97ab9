"""Methods: from evidence to a ladder of recipes."""
