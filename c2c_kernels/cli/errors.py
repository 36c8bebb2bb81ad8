"""The error that the command turns into one line and an exit status."""


class CommandError(Exception):
    """What came and what is wanted, in one line, for the person at the terminal."""
