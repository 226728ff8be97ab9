"""`python -m intarsia` is the command `intarsia`."""

from intarsia.cli.main import main

if __name__ == "__main__":
    main()
