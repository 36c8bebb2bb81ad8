from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import pytest

from c2c_kernels.corpus import COLLECTIONS, CorpusError, fortunes, html, manual
from c2c_kernels.corpus.errors import UnfinishedError

_PAGE = """<?xml version="1.0" encoding="UTF-8"?><html><head><title>no</title><script>no()</script></head><body>
<div id="banner">no</div><ul class="docnav top"><li>no</li></ul>
<div class="section"><h2 class="title"><a id="x" class="indexterm"/>6.3. The <code>apt&#8209;cache</code>
   Command</h2><div class="toc"><dl><dt>no</dt></dl></div>
 <div class="para">
    One &amp; the
    same <em>para</em>graph, 2<sup>64</sup>.<br/>Next&nbsp;line.
 </div><ul><li><p>first</p></li><li>second</li></ul>
<pre class="screen"><code>$ <strong>apt show</strong>
    indented
\tby tab\x20

after</code></pre>
<table><tr><td>a</td><td>b</td></tr><tr><td>c</td><td>d</td></tr></table>
<nav><nav>no</nav>no</nav><p>The end.<p>Unclosed</body></html>"""


def test_html_keeps_the_running_text_and_nothing_around_it():
    assert html.to_text(_PAGE) == (
        "6.3. The apt‑cache Command\n\nOne & the same paragraph, 2^64.\nNext line.\n\n- first\n\n- second\n\n"
        "$ apt show\n    indented\n    by tab\n\nafter\n\na b\nc d\n\nThe end.\n\nUnclosed"
    )


def test_html_of_nothing_is_empty():
    assert html.to_text("") == html.to_text("<html><head><title>x</title></head><body> <br/> </body></html>") == ""


_MANUAL = r""".TH FROB 3 2022-01-01 "Linux"
.SH NAME
frob \- turn it round and round without ever once stopping to think about what it is that is being turned
.SH DESCRIPTION
.BR frob ()
turns
.I x
by 5\(de; naïve users
say \(lqno\(rq.
.TS
tab(;) allbox;
l l.
Interface;Value
frob();MT-Safe
.TE
.SH SEE ALSO
.BR knob (3)
"""


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("packed", [True, False])
def test_manual_pages_come_in_whole_lines_without_header_and_footer(tmp_path: Path, packed: bool):
    path = tmp_path / ("frob.3.gz" if packed else "frob.3")
    path.write_bytes(gzip.compress(_MANUAL.encode()) if packed else _MANUAL.encode())
    assert manual.to_text(path) == (
        "NAME\nfrob - turn it round and round without ever once stopping to think about what it is that is being "
        "turned\n\nDESCRIPTION\nfrob() turns x by 5°; naïve users say “no”.\n\n"
        "| Interface | Value |\n| frob() | MT-Safe |\nSEE ALSO\nknob(3)"
    )


def test_a_manual_page_that_names_another_is_empty(tmp_path: Path):
    (tmp_path / "a.3").write_text(".so man3/frob.3\n")
    assert manual.to_text(tmp_path / "a.3") == ""


def test_a_damaged_manual_page_is_named(tmp_path: Path):
    (tmp_path / "a.3.gz").write_bytes(gzip.compress(_MANUAL.encode())[:-9])
    with pytest.raises(CorpusError, match=r"a\.3\.gz cannot be unpacked"):
        manual.to_text(tmp_path / "a.3.gz")


def test_a_manual_page_that_takes_too_long_is_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _put_groff(tmp_path, monkeypatch, "if grep -q slow; then while :; do :; done; fi")
    monkeypatch.setattr(manual, "_SECONDS", 1)
    files = [tmp_path / name for name in ("a.3", "b.3", "c.3")]
    for file, text in zip(files, ("quick", "slow", "quick"), strict=True):
        file.write_text(text)
    with pytest.raises(UnfinishedError, match=r"b\.3 within 1 seconds of processor time"):
        manual.to_text(files[1])
    assert list(COLLECTIONS["manual"].convert(files)) == [("a.3", "page"), ("b.3", None), ("c.3", "page")]


def test_a_manual_page_may_wait_for_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _put_groff(tmp_path, monkeypatch, "cat >/dev/null; sleep 2")
    monkeypatch.setattr(manual, "_SECONDS", 1)
    (tmp_path / "a.3").write_text("quick")
    assert manual.to_text(tmp_path / "a.3") == "page"
    monkeypatch.setattr(manual, "_MOST_WAITED", 1)
    with pytest.raises(UnfinishedError, match=r"a\.3 within 1 seconds$"):
        manual.to_text(tmp_path / "a.3")


def _put_groff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """A groff that does `first` and then prints a page."""
    groff = tmp_path / "bin" / "groff"
    groff.parent.mkdir()
    groff.write_text(f"#!/bin/sh\n{first}\nprintf 'head\\n       page\\nfoot\\n'\n")
    groff.chmod(0o755)
    monkeypatch.setenv("PATH", f"{groff.parent}:{os.environ['PATH']}")


def test_without_groff_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CorpusError, match="apt-get install groff"):
        manual.check()


def test_fortunes_stay_whole_and_in_order():
    parts = [f"fortune {i}: " + "word " * 100 for i in range(30)]
    texts = fortunes.to_texts("\n%\n".join(parts) + "\n%\n")
    assert "\n\n".join(texts).split("\n\n") == [part.rstrip() for part in parts]
    assert len(texts) == 4 and all(4000 <= len(text) < 4600 for text in texts[:3])


def test_fortunes_lose_their_control_characters_and_nothing_else():
    assert fortunes.to_texts("b\x08bold\x07\n\tby 5%\n%\n\n%\n%%\n\n  indented\n") == ["bold\n    by 5%\n\n  indented"]
