"""Exporting to runtimes: checks of a folder for all of them, and GGUF."""
