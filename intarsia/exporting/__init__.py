"""Where models run: what they all expect of a folder, and the forms that some of them want instead."""
