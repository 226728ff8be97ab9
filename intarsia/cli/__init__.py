"""The command line: parse, call, print. One verb a file."""
