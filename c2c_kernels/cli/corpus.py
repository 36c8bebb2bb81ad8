"""`c2c-kernels corpus`: text that Debian ships, as documents to fit, train and evaluate on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from c2c_kernels import corpus
from c2c_kernels.cli import outputs, texts


def add_parser(commands: Any) -> None:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "corpus",
        help="fetch text that Debian ships, as documents to fit, train and evaluate on",
        description="Downloads Debian packages with apt (no root, nothing is installed), turns their pages into plain "
        "text and splits them by document: four in five to fit on, one in five held out, decided by the name.",
        epilog="; ".join(f"{entry.name}: {entry.what}" for entry in corpus.COLLECTIONS.values()),
    )
    parser.add_argument(
        "--collection",
        action="append",
        choices=tuple(corpus.COLLECTIONS),
        metavar="NAME",
        help=f"{', '.join(corpus.COLLECTIONS)} (repeatable; default: all)",
    )
    parser.add_argument("--output", metavar="FILE.jsonl", help="write the documents to one file too")
    parser.add_argument("--split", choices=corpus.documents.SPLITS, help="of what --output writes (default: both)")
    parser.add_argument("--again", action="store_true", help="fetch anew what is there already")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Fetches what is missing and prints what there is; returns the exit status."""
    if options.output is not None:
        outputs.check("--output", Path(options.output), ".jsonl")
    found = texts.builds(options.collection, again=options.again)
    if options.output is not None:
        everything = [document for build in found for document in build.documents]
        try:
            corpus.write(corpus.select(everything, split=options.split), Path(options.output))
        except OSError as error:
            raise outputs.unwritten("--output", Path(options.output), error) from error
    print(json.dumps([_record(build) for build in found], indent=2) if options.json else _text(found))
    return 0


def _record(build: corpus.Build) -> dict[str, Any]:
    return {
        "collection": build.collection,
        "path": str(build.path),
        "packages": [asdict(package) for package in build.packages],
        "left_out": list(build.left_out),
        "splits": {
            split: {
                "documents": len(part),
                "characters": sum(len(document.text) for document in part),
                "sha256": corpus.digest(part),
            }
            for split in corpus.documents.SPLITS
            for part in [[document for document in build.documents if document.split == split]]
        },
    }


def _text(found: Sequence[corpus.Build]) -> str:
    lines = []
    for build in found:
        splits = _record(build)["splits"]
        amounts = "; ".join(
            f"{split} {entry['documents']} documents, {entry['characters'] / 1e6:.2f} M characters"
            for split, entry in splits.items()
        )
        lines += [f"{build.collection}: {amounts}", f"  {build.path}"]
        lines += [f"  {package.name} {package.version}, SHA-256 {package.sha256}" for package in build.packages]
        lines += [f"  left out, not converted in time: {', '.join(build.left_out)}"] if build.left_out else []
    return "\n".join(lines)
