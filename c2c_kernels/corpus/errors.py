"""The error of this package."""


class CorpusError(ValueError):
    """What came and what is wanted, in one line, for text that cannot be read, fetched or converted."""


class UnfinishedError(CorpusError):
    """A text whose conversion took too long: it can be left out, and the others are none the worse."""
