"""Packages made here, served from a local archive: apt runs as it does for users, without a network."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from c2c_kernels import corpus
from c2c_kernels.corpus import packages

pytestmark = pytest.mark.skipif(
    not (shutil.which("apt-get") and shutil.which("dpkg-deb")), reason="apt-get and dpkg-deb are not here"
)

_PROSE = "<p>A paragraph about the frob that is long enough to be a page of its own. </p>" * 12
# Without the manual pages: those need groff, and are tested beside their converter.
_HANDBOOK = replace(corpus.COLLECTIONS["handbook"], packages={"tiny-handbook": ("usr/share/doc/tiny/*.html",)})


class Archive:
    """An archive of packages in a folder, and apt settings that know it alone."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root / "archive"
        self.root.mkdir()
        self._entries: list[str] = []
        sources = root / "sources.list"
        sources.write_text(f"deb [trusted=yes] file:{self.root} ./\n")
        (root / "lists" / "partial").mkdir(parents=True)  # apt's own lists are empty, as in slim containers
        settings = root / "apt.conf"
        settings.write_text(
            f'Dir::Etc::SourceList "{sources}";\nDir::Etc::SourceParts "/dev/null";\n'
            f'Dir::State::Lists "{root}/lists";\nDir::Cache "{root}/cache";\n'
        )
        monkeypatch.setenv("APT_CONFIG", str(settings))
        self.publish()

    def add(self, name: str, files: dict[str, str], version: str = "1:2.0-1") -> None:
        tree = self.root.parent / f"tree-{name}"
        (tree / "DEBIAN").mkdir(parents=True)
        control = (
            f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\n"
            "Description: text for a test\n"
        )
        (tree / "DEBIAN" / "control").write_text(control)
        for path, content in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(content)
        deb = self.root / f"{name}_{version.partition(':')[2]}_all.deb"
        subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, deb], check=True, capture_output=True)
        digest = hashlib.sha256(deb.read_bytes()).hexdigest()
        self._entries.append(f"{control}Filename: ./{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {digest}\n")
        self.publish()

    def publish(self) -> None:
        (self.root / "Packages").write_text("\n".join(self._entries))


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    return Archive(tmp_path, monkeypatch)


def _handbook(archive: Archive) -> None:
    folder = "usr/share/doc/tiny"
    pages = {f"{folder}/page{i}.html": f"<html><body><h1>Page {i}</h1>{_PROSE}</body></html>" for i in range(12)}
    pages[f"{folder}/stub.html"] = "<html><body>Too short.</body></html>"
    pages[f"{folder}/page1copy.html"] = pages[f"{folder}/page1.html"]
    pages[f"{folder}/other.css"] = "body {}"
    archive.add("tiny-handbook", pages)


def test_a_package_becomes_documents_with_a_record(archive: Archive, tmp_path: Path):
    _handbook(archive)
    steps: list[str] = []
    build = corpus.build(_HANDBOOK, tmp_path / "out", steps.append)
    deb = archive.root / "tiny-handbook_2.0-1_all.deb"
    assert build.packages == (corpus.Package("tiny-handbook", "1:2.0-1", hashlib.sha256(deb.read_bytes()).hexdigest()),)
    # the stub is too short, the copy is there already
    assert {d.name for d in build.documents} == {f"handbook/page{i}" for i in range(12)}
    assert all(
        d.text.startswith(f"Page {d.name.removeprefix('handbook/page')}\n\nA paragraph") for d in build.documents
    )
    assert {d.split for d in build.documents} == {"fit", "held-out"}
    assert steps == ["download tiny-handbook", "convert tiny-handbook"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["handbook.json", "handbook.jsonl"]
    assert corpus.open_build(_HANDBOOK, tmp_path / "out") == build
    assert list(build.documents) == corpus.read(build.path)


def test_the_same_package_gives_the_same_bytes(archive: Archive, tmp_path: Path):
    _handbook(archive)
    first, second = (corpus.build(_HANDBOOK, tmp_path / name).path.read_bytes() for name in ("a", "b"))
    assert first == second


def test_what_is_not_converted_in_time_is_left_out_and_on_record(archive: Archive, tmp_path: Path):
    _handbook(archive)

    def convert(files: list[Path]):
        return ((name, None if name == "page7" else text) for name, text in _HANDBOOK.convert(files))

    build = corpus.build(replace(_HANDBOOK, convert=convert), tmp_path)
    assert {d.name for d in build.documents} == {f"handbook/page{i}" for i in range(12) if i != 7}
    assert build.left_out == ("handbook/page7",)
    assert corpus.open_build(_HANDBOOK, tmp_path) == build


@pytest.mark.parametrize("damage", ["truncated", "edited", "record", "format", "missing"])
def test_what_is_damaged_is_not_opened(archive: Archive, tmp_path: Path, damage: str):
    _handbook(archive)
    path = corpus.build(_HANDBOOK, tmp_path).path
    record = path.with_suffix(".json")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "edited":
        path.write_text(path.read_text().replace("frob", "knob"))
    elif damage == "record":
        record.write_text(record.read_text()[:-20])
    elif damage == "format":
        record.write_text(json.dumps({**json.loads(record.read_text()), "format": 0}))
    else:
        path.unlink()
    assert corpus.open_build(_HANDBOOK, tmp_path) is None


def test_a_package_that_the_release_lacks_is_named(archive: Archive, tmp_path: Path):
    with pytest.raises(corpus.CorpusError, match="cannot download the package tiny-handbook: .*Unable to locate"):
        corpus.build(_HANDBOOK, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_package_without_the_pages_is_named(archive: Archive, tmp_path: Path):
    archive.add("tiny-handbook", {"usr/share/doc/tiny/stub.html": "<p>short"})
    with pytest.raises(corpus.CorpusError, match="tiny-handbook 1:2.0-1 holds no text of at least 600 characters"):
        corpus.build(_HANDBOOK, tmp_path / "out")


def test_a_damaged_download_is_refused(archive: Archive, tmp_path: Path):
    _handbook(archive)
    deb = archive.root / "tiny-handbook_2.0-1_all.deb"
    content = bytearray(deb.read_bytes())
    content[len(content) // 2] ^= 1
    deb.write_bytes(bytes(content))
    with pytest.raises(corpus.CorpusError, match="cannot download the package tiny-handbook"):
        corpus.build(_HANDBOOK, tmp_path / "out")


def test_a_file_that_is_no_package_is_named(tmp_path: Path):
    (tmp_path / "a.deb").write_bytes(b"!<arch>\n")
    with pytest.raises(corpus.CorpusError, match="dpkg-deb --extract .*a.deb"):
        packages.unpack(tmp_path / "a.deb", tmp_path / "out")


def test_without_apt_the_error_says_what_else_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(corpus.CorpusError, match="apt-get is not here.*documents of your own"):
        corpus.build(_HANDBOOK, tmp_path / "out")
    assert not (tmp_path / "out").exists()
