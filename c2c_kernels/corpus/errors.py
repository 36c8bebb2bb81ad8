"""The error of this package."""


class CorpusError(ValueError):
    """What came and what is wanted, in one line, for text that cannot be read, fetched or converted."""
