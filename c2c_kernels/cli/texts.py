"""The documents that `--corpus` names: Debian's collections, fetched where they are not there yet, or files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from c2c_kernels import corpus
from c2c_kernels.cli.cache import cache_dir, locked
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.progress import note, stage

DEBIAN = "debian"
HELP = (
    f"'{DEBIAN}' (all collections), '{DEBIAN}:{','.join(corpus.COLLECTIONS)}' (some of them), a .jsonl file of "
    "documents, a text file, or a folder of text files"
)


def documents(spec: str, split: str | None) -> list[corpus.Document]:
    """The documents of one split of the corpus that `spec` names, see HELP.

    Args:
        split: "fit", "held-out", or None for both.

    Raises:
        CommandError: for what cannot be read, fetched or found.
    """
    try:
        if spec == DEBIAN or spec.startswith(f"{DEBIAN}:"):
            names = [name.strip() for name in spec.partition(":")[2].split(",") if name.strip()]
            found = [document for build in builds(names or None) for document in build.documents]
        else:
            found = corpus.read(spec)
        return corpus.select(found, split=split)
    except corpus.CorpusError as error:
        raise CommandError(f"--corpus {spec}: {error}") from error


def builds(names: Sequence[str] | None, *, again: bool = False) -> list[corpus.Build]:
    """The named collections of Debian, or all, from the cache folder; made where they are missing or damaged.

    Args:
        again: make them anew, with the packages that the release has now.

    Raises:
        CommandError: for an unknown name, or a collection that cannot be made.
    """
    wanted = list(dict.fromkeys(names or corpus.COLLECTIONS))
    for name in wanted:
        if name not in corpus.COLLECTIONS:
            raise CommandError(f"there is no collection {name!r}: one of {', '.join(corpus.COLLECTIONS)} is wanted")
    return [_build(corpus.COLLECTIONS[name], cache_dir() / "corpus", again) for name in wanted]


def _build(collection: corpus.Collection, folder: Path, again: bool) -> corpus.Build:
    with locked(f"corpus-{collection.name}"):
        there = (folder / f"{collection.name}.jsonl").exists()
        found = None if again else corpus.open_build(collection, folder)
        if found is not None:
            return found
        if there and not again:
            note(f"{folder / collection.name}.jsonl is damaged or of an older version: it is made again")
        steps = 2 * len(collection.packages)
        done: list[str] = []
        try:
            with stage(f"fetch the {collection.name} texts from Debian", steps) as update:

                def step(what: str) -> None:
                    update(len(done))
                    done.append(what)

                found = corpus.build(collection, folder, step)
        except corpus.CorpusError as error:
            raise CommandError(f"the {collection.name} texts cannot be had: {error}") from error
        if found.left_out:
            note(
                f"{len(found.left_out)} of the {collection.name} texts left out, whose conversion did not end in time: "
                f"{', '.join(found.left_out)}; `c2c-kernels corpus --collection {collection.name} --again` tries anew"
            )
        return found
