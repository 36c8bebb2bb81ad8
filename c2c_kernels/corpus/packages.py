"""Debian packages: downloaded by apt, unpacked by dpkg-deb, without root and without installing anything."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from c2c_kernels.corpus.errors import CorpusError

_SECONDS = 600


@dataclass(frozen=True)
class Package:
    """What was fetched: the version that this Debian release has, and the SHA-256 of the file."""

    name: str
    version: str
    sha256: str


def check() -> None:
    """CorpusError where apt-get or dpkg-deb is missing."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise CorpusError(
                f"{tool} is not here: these texts come in Debian packages and need Debian or Ubuntu; "
                "elsewhere give documents of your own (JSON lines, text files)"
            )


def download(name: str, folder: Path, state: Path) -> Path:
    """Downloads the package `name` into `folder`; apt checks it against the archive's signed lists.

    Where apt has no list that names the package (slim container images ship none), the lists are fetched into
    `state`, which needs no root, and the download is tried again.

    Raises:
        CorpusError: with apt's last error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    error = _apt(["download", name], folder)
    if error:
        for part in ("lists/partial", "cache/archives/partial"):
            (state / part).mkdir(parents=True, exist_ok=True)
        private = ["-o", f"Dir::State::Lists={state}/lists", "-o", f"Dir::Cache={state}/cache"]
        # An update that cannot reach the archive ends well, with warnings: the download says what is wrong.
        error = _apt([*private, "update"], folder) or _apt([*private, "download", name], folder)
    found = sorted(folder.glob(f"{name}_*.deb"))
    if error or len(found) != 1:
        raise CorpusError(f"apt-get cannot download the package {name}: {error or f'{len(found)} files came'}")
    return found[0]


def unpack(deb: Path, folder: Path) -> Package:
    """Unpacks the files of `deb` below `folder`; returns what it is."""
    _dpkg("--extract", str(deb), str(folder))
    name = _dpkg("--field", str(deb), "Package").strip()
    version = _dpkg("--field", str(deb), "Version").strip()
    return Package(name, version, hashlib.sha256(deb.read_bytes()).hexdigest())


def _dpkg(*arguments: str) -> str:
    run = subprocess.run(["dpkg-deb", *arguments], capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines() or ["no reason given"]
        raise CorpusError(f"dpkg-deb {' '.join(arguments[:2])}: {lines[-1]}")
    return run.stdout


def _apt(arguments: Sequence[str], folder: Path) -> str:
    """Runs apt-get in `folder`; its last error, empty where it succeeded."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    options = ["-q", "-o", "Acquire::Retries=2", "-o", "APT::Sandbox::User="]
    try:
        run = subprocess.run(
            ["apt-get", *options, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no end within {_SECONDS} seconds"
    if run.returncode == 0:
        return ""
    lines = [line[2:].strip() for line in run.stderr.splitlines() if line.startswith("E:")]
    return lines[0] if lines else f"exit status {run.returncode}"
