"""Questions about real documents, where the answer can be taken out of the text exactly.

Three kinds: the abbreviation of a term that the text writes out before it ("Transmission Control Protocol
(TCP)", the letters checked against the words); the header file that a manual page's synopsis includes, where it is
one; and the name that a manual page gives to what it describes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from c2c_kernels.corpus.documents import Document
from c2c_kernels.corpus.errors import CorpusError
from c2c_kernels.corpus.questions import Question, normal

# Characters of context: about 400 tokens.
_CONTEXT = 1600
_TERM = re.compile(r"\b((?:[A-Z][A-Za-z0-9]+[ -]){1,6}[A-Z][A-Za-z0-9]+) \(([A-Z][A-Z0-9]{1,7})\)")
_PAGE_NAME = re.compile(r"NAME\n\s*([\w.+-]+) - (.+)\n")
_INCLUDE = re.compile(r"#include <([\w/.]+)>")


def about(documents: Iterable[Document]) -> list[Question]:
    """Every question that the documents give, in order.

    Raises:
        CorpusError: where there is none.
    """
    given = list(documents)
    found = [question for document in given for question in (*_abbreviations(document), *_manual(document))]
    # An answer that stands in its question is no question.
    found = [q for q in found if f" {normal(q.answer)} " not in f" {normal(q.question)} "]
    if not found:
        raise CorpusError(
            f"{len(given)} documents give no question: abbreviations with their words before them, or manual pages, "
            "are wanted"
        )
    return found


def _abbreviations(document: Document) -> Iterator[Question]:
    seen = set()
    for match in _TERM.finditer(document.text):
        term, short = _spelled_out(match[1], match[2]), match[2]
        if short in seen or not term:
            continue
        seen.add(short)
        context = _around(document.text, match.start(), match.end())
        if context is not None:
            question = f"What is the abbreviation of {term}?"
            yield Question(context, question, short, "abbreviation", "abbreviation", document.name)


def _spelled_out(words: str, short: str) -> str:
    """The last of the words whose capitals, those inside words included, are the abbreviation; empty for none."""
    starts = [0, *(match.end() for match in re.finditer(r"[ -]", words))]
    terms = (words[start:] for start in starts)
    return next((term for term in terms if "".join(re.findall(r"[A-Z0-9]", term)) == short), "")


def _manual(document: Document) -> Iterator[Question]:
    head = document.text[:_CONTEXT]
    page = _PAGE_NAME.match(head)
    if page is None:
        return
    name, what = page[1], page[2].strip().rstrip(".")
    yield Question(head, f"Which manual page is about this: {what}?", name, "name of a page", "name", document.name)
    headers = set(_INCLUDE.findall(head.partition("DESCRIPTION")[0]))
    if len(headers) == 1:
        question = f"Which header file has to be included to use {name}?"
        yield Question(head, question, headers.pop(), "header file", "header", document.name)


def _around(text: str, start: int, end: int) -> str | None:
    """Whole paragraphs around text[start:end], as many as fit; None where its own paragraph is too long."""
    bounds = [0, *(match.end() for match in re.finditer(r"\n\s*\n", text)), len(text)]
    first = max(i for i, bound in enumerate(bounds[:-1]) if bound <= start)
    last = first + 1
    if end > bounds[last] or bounds[last] - bounds[first] > _CONTEXT:
        return None
    while True:
        if first and bounds[last] - bounds[first - 1] <= _CONTEXT:
            first -= 1
        elif last + 1 < len(bounds) and bounds[last + 1] - bounds[first] <= _CONTEXT:
            last += 1
        else:
            return text[bounds[first] : bounds[last]].strip()
