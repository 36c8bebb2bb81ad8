"""HTML pages of documentation to plain text, on the standard library's parser."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_SKIPPED_TAGS = frozenset(("head", "script", "style", "nav", "footer", "form", "svg", "template"))
# What DocBook, Publican, Sphinx and debiandoc put around the text of a page, and lists of its contents.
_SKIPPED_CLASSES = frozenset(
    (
        *("docnav", "navheader", "navfooter", "related", "sphinxsidebar", "sphinxsidebarwrapper", "headerlink"),
        *("footer", "toc", "toctree-wrapper", "contents", "local", "clearer", "copyright", "legalnotice", "hidden"),
    )
)
_SKIPPED_IDS = frozenset(("banner", "title", "search", "indices-and-tables"))
_BLOCKS = frozenset(
    (
        *("address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl", "dt"),
        *("fieldset", "figcaption", "figure", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "ol"),
        *("p", "pre", "section", "summary", "table", "tbody", "tfoot", "thead", "tr", "ul"),
    )
)
_TIGHT = frozenset(("li", "dt", "dd", "tr", "caption", "ol", "ul", "dl", "tbody", "thead"))  # no blank line around
# Stand for a space and a line's end in <pre> until the space between tags is gone.
_KEPT_SPACE, _KEPT_LINE = "\ue000", "\ue001"
# Stand for where a line or a block begins or ends; several in a row are one.
_NEW_LINE, _NEW_BLOCK = "\ue002", "\ue003"
_BREAKS = _NEW_LINE + _NEW_BLOCK
_KEEP = str.maketrans({" ": _KEPT_SPACE, "\n": _KEPT_LINE, "\t": _KEPT_SPACE * 4})
_GIVE_BACK = str.maketrans({_KEPT_SPACE: " ", _KEPT_LINE: "\n"})
_VOID = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr")
)


def to_text(page: str) -> str:
    """The page's running text: paragraphs on one line each with a blank line between, `<pre>` as it stands."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    return reader.text()


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._pieces: list[str] = []
        self._skipping: tuple[str, int] | None = None  # the tag that is left out, and how deep in its own kind
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipping is not None:
            name, depth = self._skipping
            if tag == name:
                self._skipping = name, depth + 1
            return
        if tag not in _VOID and _is_skipped(tag, dict(attrs)):
            self._skipping = tag, 1
            return
        if tag == "br":
            self._pieces.append("\n")
        elif tag in ("td", "th"):
            self._pieces.append(" ")
        elif tag == "sup":
            self._pieces.append("^")
        self._break(tag)
        if tag == "li":
            self._pieces.append("- ")
        self._preformatted += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # XHTML: an element that is empty, whatever its class.
        if self._skipping is None:
            self._pieces.append("\n" if tag == "br" else "")
            self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._skipping is not None:
            name, depth = self._skipping
            if tag == name:
                self._skipping = (name, depth - 1) if depth > 1 else None
            return
        self._preformatted = max(0, self._preformatted - (tag == "pre"))
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._skipping is None:
            self._pieces.append(data.translate(_KEEP) if self._preformatted else re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        if tag in _BLOCKS:
            self._pieces.append(_NEW_LINE if tag in _TIGHT else _NEW_BLOCK)

    def text(self) -> str:
        text = "".join(self._pieces).replace("\xa0", " ").replace("\xad", "").replace("\u200b", "")
        text = re.sub(r" *\n *", "\n", re.sub(r" +", " ", text))
        text = re.sub(rf"[ \n{_BREAKS}]*[{_BREAKS}][ \n{_BREAKS}]*", _as_lines, text)
        text = re.sub(r"\n- *\n+", "\n- ", text)  # a paragraph inside a list item
        text = re.sub(rf"[{_KEPT_SPACE} ]*(?=[\n{_KEPT_LINE}])", "", text).translate(_GIVE_BACK)
        return re.sub(r"\n{3,}", "\n\n", text).strip()


def _as_lines(breaks: re.Match[str]) -> str:
    return "\n\n" if _NEW_BLOCK in breaks[0] else "\n"


def _is_skipped(tag: str, attributes: dict[str, str | None]) -> bool:
    classes = (attributes.get("class") or "").lower().split()
    return (
        tag in _SKIPPED_TAGS
        or not _SKIPPED_CLASSES.isdisjoint(classes)
        or (attributes.get("id") or "").lower() in _SKIPPED_IDS
    )
