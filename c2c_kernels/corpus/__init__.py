"""Text to fit, train and evaluate on: documents with names and hashes, and what Debian ships as such documents.

    from c2c_kernels import corpus

    documents = corpus.read("notes.jsonl")                    # JSON lines, a text file, or a folder of them
    held_out = corpus.select(documents, split="held-out")     # by document, decided by the name alone
    questions = corpus.made_up(1000, seed=0, split="fit")     # (context, question, answer)

Nothing here needs torch, and nothing is fetched on import. `c2c-kernels corpus` makes the Debian documents.
"""

from c2c_kernels.corpus.collections import COLLECTIONS, Collection
from c2c_kernels.corpus.debian import Build, build, open_build
from c2c_kernels.corpus.documents import Document, digest, read, select, split_of, write
from c2c_kernels.corpus.errors import CorpusError
from c2c_kernels.corpus.extracted import about
from c2c_kernels.corpus.facts import made_up, recalled
from c2c_kernels.corpus.packages import Package
from c2c_kernels.corpus.questions import Question, is_exact, is_right, read_questions, write_questions

__all__ = [
    "COLLECTIONS",
    "Build",
    "Collection",
    "CorpusError",
    "Document",
    "Package",
    "Question",
    "about",
    "build",
    "digest",
    "is_exact",
    "is_right",
    "made_up",
    "open_build",
    "read",
    "read_questions",
    "recalled",
    "select",
    "split_of",
    "write",
    "write_questions",
]
