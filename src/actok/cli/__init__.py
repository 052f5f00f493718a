"""The command line: thin verbs over the library. Importing this package loads nothing heavy."""

from actok.cli.main import main

__all__ = ["main"]
