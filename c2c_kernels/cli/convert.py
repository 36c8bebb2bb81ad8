"""GGUF models in Transformers' own format, kept in the cache folder.

De-quantising takes Transformers ten seconds and more each time; loading the result takes a fraction of one.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2c_kernels.cli.cache import cache_dir, locked, remove_abandoned, replace_folder, sha256, staging
from c2c_kernels.cli.gguf_tokenizer import load_tokenizer
from c2c_kernels.cli.progress import note, stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT = 1  # raised when what is written here changes
_MANIFEST = "manifest.json"


def converted_folder(file: str) -> Path:
    """Where the conversion of the packaged GGUF `file` is kept."""
    return cache_dir() / "models" / file.removesuffix(".gguf")


def is_sound(folder: Path, source_sha256: str) -> bool:
    """Whether `folder` is a whole and undamaged conversion of that source by this version of Transformers."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return manifest["made"] == _made(source_sha256) and all(
            sha256(folder / name) == digest for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def convert(gguf: Path, source_sha256: str) -> Path:
    """The folder with the float32 weights and the tokenizer of `gguf`, made where it is missing or damaged."""
    target = converted_folder(gguf.name)
    with locked(target.name):
        remove_abandoned("convert-")
        if is_sound(target, source_sha256):
            return target
        if target.exists():
            note(f"{target} is damaged or from another version: it is made again")
        with staging(f"convert-{target.name}") as folder:
            new = folder / "model"
            new.mkdir()
            with stage("build the tokenizer"):
                load_tokenizer(gguf).save_pretrained(new)
            with stage("de-quantise the weights"):
                _save_weights(load_gguf(gguf), new)
            files = {path.name: sha256(path) for path in sorted(new.iterdir())}
            (new / _MANIFEST).write_text(json.dumps({"made": _made(source_sha256), "files": files}, indent=1))
            replace_folder(new, target)
    return target


def load_gguf(gguf: Path, dtype: Any = None) -> PreTrainedModel:
    """The model in a GGUF file through Transformers, its weights de-quantised to `dtype` (None: float32)."""
    import torch
    from transformers import AutoModelForCausalLM

    # No setting stops the progress bar of the de-quantisation.
    with without_bars(), contextlib.redirect_stderr(io.StringIO()):
        return AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype or torch.float32)


@contextmanager
def without_bars() -> Iterator[None]:
    """Turns off Transformers' own progress bars."""
    from transformers.utils import logging

    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()


def _save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Saves `model` as an ordinary one: a fresh instance around its weights, which knows of no GGUF."""
    import torch
    from safetensors import SafetensorError

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    try:
        with without_bars():
            plain.save_pretrained(folder)
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{folder.parent} cannot be written, {error}") from error


def _made(source_sha256: str) -> dict[str, Any]:
    import transformers

    return {"format": _FORMAT, "source": source_sha256, "transformers": transformers.__version__}
