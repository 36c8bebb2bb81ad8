"""`c2c-kernels convert`: fusers between rosetta's checkpoint folders and our safetensors files."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2c_kernels.cli import outputs
from c2c_kernels.cli.errors import CommandError
from c2c_kernels.cli.progress import note

if TYPE_CHECKING:
    from c2c_kernels.fusers import C2CFuser

_SUFFIX = ".safetensors"


def add_parser(commands: Any) -> None:
    """Adds the command's arguments."""
    parser = commands.add_parser(
        "convert",
        help="a fuser from the checkpoint of the reference implementation to a safetensors file, and back",
        description="A folder with projector_config.json becomes a safetensors file (one per sharer: --sharer), one or "
        "more safetensors files become such a folder, for sharers 1, 2, ... in this order. Nothing is unpickled but "
        "plain tensors.",
    )
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="a checkpoint folder, or safetensors files")
    parser.add_argument("--output", required=True, metavar="TARGET", help="the file, or a folder without a checkpoint")
    parser.add_argument("--sharer", type=int, metavar="N", help="of a checkpoint with several: which (1, 2, ...)")
    parser.add_argument("--receiver-name", default="", metavar="NAME", help="to write into the file")
    parser.add_argument("--sharer-name", default="", metavar="NAME", help="to write into the file")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights in the file (default: as they are)"
    )


def run(options: argparse.Namespace) -> int:
    """Converts and says what was written; returns the exit status."""
    sources = [Path(source) for source in options.source]
    for source in sources:
        if not source.exists():
            raise CommandError(f"{source} does not exist")
    folders = [source for source in sources if source.is_dir()]
    if folders and len(sources) > 1:
        raise CommandError(f"{folders[0]} is a folder: one folder, or safetensors files, are wanted")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            _to_file(options, sources[0]) if folders else _to_folder(options, sources)
        except (ValueError, ImportError) as error:
            raise CommandError(str(error)) from error
        except OSError as error:
            raise outputs.unwritten("--output", Path(options.output), error) from error
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            note(str(warning.message))
    return 0


def _to_file(options: argparse.Namespace, folder: Path) -> None:
    import torch

    from c2c_kernels.integrations.rosetta.checkpoints import load_checkpoint

    output = Path(options.output)
    outputs.check("--output", output, _SUFFIX)
    fusers = load_checkpoint(folder)
    number = options.sharer if options.sharer is not None else min(fusers)
    if number not in fusers or (options.sharer is None and len(fusers) > 1):
        raise CommandError(f"{folder} has fusers for sharers {sorted(fusers)}: name one with --sharer")
    fuser = fusers[number]
    if options.receiver_name:
        fuser.receiver = replace(fuser.receiver, name=options.receiver_name)
    if options.sharer_name:
        fuser.sharer = replace(fuser.sharer, name=options.sharer_name)
    fuser.facts = {"converted_from": folder.name, "sharer": number}
    fuser.save(output, storage=None if options.dtype is None else getattr(torch, options.dtype))
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, {_described(fuser)}")


def _to_folder(options: argparse.Namespace, files: list[Path]) -> None:
    from c2c_kernels.fusers import C2CFuser
    from c2c_kernels.integrations.rosetta.checkpoints import save_checkpoint

    for name in ("sharer", "receiver_name", "sharer_name", "dtype"):
        if getattr(options, name) not in (None, ""):
            raise CommandError(f"--{name.replace('_', '-')} goes with a checkpoint folder, {files[0]} is a file")
    fusers = {number: C2CFuser.load(file) for number, file in enumerate(files, 1)}
    save_checkpoint(fusers, options.output)
    for number, fuser in fusers.items():
        print(f"{options.output}, sharer {number}: {_described(fuser)}")


def _described(fuser: C2CFuser) -> str:
    report = fuser.gate_report()
    still = sum(gates.key + gates.value for gates in report)
    shape = fuser.shape
    return (
        f"{len(report)} layers, {shape.sharer_heads} x {shape.sharer_head_dim} to {shape.kv_heads} x {shape.head_dim}, "
        f"{still} of {2 * len(report)} gates open"
    )
