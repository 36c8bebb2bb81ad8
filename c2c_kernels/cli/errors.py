"""The error that the command turns into one line and an exit status."""

import re


class CommandError(Exception):
    """What came and what is wanted, in one line, for the person at the terminal."""


def without_addresses(text: str) -> str:
    """`text` without network addresses: an index's address can hold a password."""
    return re.sub(r"host='[^']*', port=\d+", "(address)", re.sub(r"\w+://\S+", "(address)", text))
