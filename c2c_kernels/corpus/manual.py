"""Manual pages to plain text, by groff."""

from __future__ import annotations

import gzip
import re
import resource
import shutil
import subprocess
from pathlib import Path

from c2c_kernels.corpus.errors import CorpusError, UnfinishedError

# Tables, equations, UTF-8 in and out; no colours, bold or underlining; lines as long as paragraphs, not hyphenated and
# not justified. Without -U groff is in its safe mode: a page can neither run commands nor open files.
_GROFF = ("groff", "-k", "-e", "-t", "-man", "-Tutf8", "-P-cbou", "-rLL=5000n", "-rHY=0", "-dAD=l")
# Of each of groff's programs, of processor time: other work on the machine must not decide which pages a corpus has.
_SECONDS = 60
_MOST_WAITED = 1800  # by the clock
_LIMITED = ("sh", "-c", 'ulimit -t "$1" && shift && exec "$@"', "groff")
_RULE = re.compile(r"[\s─│┌┐└┘├┤┬┴┼═╞╡╪╤╧╒╕╘╛]*[─═][\s─│┌┐└┘├┤┬┴┼═╞╡╪╤╧╒╕╘╛]*")  # of a table


def check() -> None:
    """CorpusError where groff is missing."""
    if shutil.which("groff") is None:
        raise CorpusError("manual pages are converted by groff, which is not installed (Debian: apt-get install groff)")


def to_text(path: Path) -> str:
    """The text of a manual page (`.gz` or not), without header and footer; empty for a page that names another one.

    Raises:
        UnfinishedError: where groff takes more than a minute of processor time, or half an hour by the clock.
        CorpusError: where the file cannot be unpacked or groff fails.
    """
    try:
        source = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, gzip.BadGzipFile) as error:
        raise CorpusError(f"{path} cannot be unpacked: {error}") from error
    if re.match(rb"\s*\.so\s+\S+\s*$", source):
        return ""
    before = _processor_seconds()
    try:
        command = (*_LIMITED, str(_SECONDS), *_GROFF)
        run = subprocess.run(command, input=source, capture_output=True, timeout=_MOST_WAITED)
    except subprocess.TimeoutExpired as error:
        raise UnfinishedError(f"groff did not finish {path} within {_MOST_WAITED} seconds") from error
    if run.returncode != 0 and _processor_seconds() - before > 0.9 * _SECONDS:  # the limit's clock ticks more coarsely
        raise UnfinishedError(f"groff did not finish {path} within {_SECONDS} seconds of processor time")
    if run.returncode != 0:
        raise CorpusError(f"groff fails on {path}: {run.stderr.decode(errors='replace').strip()[:200]}")
    return _tidy(run.stdout.decode(errors="replace"))


def _processor_seconds() -> float:
    """Of all programs that this process has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _tidy(output: str) -> str:
    lines = output.replace("\xad", "").replace("\u2010", "-").replace("\u2212", "-").strip("\n").split("\n")
    lines = lines[1:-1]  # the first is the page's header, the last its footer
    # The body is indented by seven spaces.
    lines = [_cells(line.rstrip().removeprefix(" " * 7)) for line in lines if not _RULE.fullmatch(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _cells(line: str) -> str:
    """The line with `|` between the cells of a table and gaps, which are as wide as the line was long, narrowed."""
    line = re.sub(r"\s*│\s*", " | ", line).strip() if "│" in line else line
    return re.sub(r"(?<=\S) {4,}(?=\S)", "   ", line)
