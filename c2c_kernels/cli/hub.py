"""Models on the Hugging Face hub: what is on the disk already, and whether the hub can be reached."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from c2c_kernels.cli.errors import CommandError

PROBE_SECONDS = 3.0
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_UNWANTED = ["onnx/*", "runs/*"]


def local_snapshot(repository: str) -> Path | None:
    """The folder of a complete snapshot in the hub's own cache, or None. Reads the disk only."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, local_files_only=True, allow_patterns=_WANTED))
    except (OSError, ValueError):
        return None
    return folder if is_complete(folder) else None


def is_complete(folder: Path) -> bool:
    """Whether the folder holds a configuration and every safetensors file that its index names."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    return all((folder / name).is_file() for name in set(json.loads(index.read_text())["weight_map"].values()))


def why_unreachable(repository: str, seconds: float = PROBE_SECONDS) -> str:
    """Why the hub does not give out the repository's configuration within `seconds`; empty where it does."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE)"
    outcome = [f"no answer within {seconds:g} seconds"]

    def probe() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(repository, "config.json"), timeout=seconds)
            outcome[0] = ""
        except Exception as error:  # whatever network, proxy or hub make of it: the hub is of no use then
            outcome[0] = f"not reachable, {type(error).__name__}"

    # A thread, because a timeout of the client covers neither the look-up of the name nor its own retries.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0]


def download(repository: str) -> Path:
    """The repository's snapshot, downloaded with the hub's own progress bars. CommandError where that fails."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except (OSError, ValueError) as error:
        raise CommandError(f"the hub broke off the download of {repository}: {type(error).__name__}") from error
