"""Compiles the C program of the machine measurement with the system compiler."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from c2c_kernels.bench.machine_source import SOURCE

# The best instruction set of this processor under the name that the compiler knows, else its default.
_TUNINGS = ("-march=native", "-mcpu=native", "")
_SECONDS = 60


class NoCompilerError(Exception):
    """Why there is no compiled program, in one line."""


@dataclass(frozen=True)
class Program:
    """The loaded program.

    Attributes:
        library: with the entries of machine_source.SOURCE.
        compiler: its first line of version.
        bits: width of its vectors.
        parallel: whether it runs on several threads.
    """

    library: ctypes.CDLL
    compiler: str
    bits: int
    parallel: bool


def build() -> Program:
    """Compiles and loads the program; NoCompilerError says why not. $CC names another compiler than cc."""
    command = _command()
    with tempfile.TemporaryDirectory(prefix="c2c-bench-") as folder:
        source, library = Path(folder) / "machine.c", Path(folder) / "machine.so"
        source.write_text(SOURCE)
        error = ""
        for openmp in ("-fopenmp", ""):
            for tuning in _TUNINGS:
                flags = [*filter(None, ("-O3", "-shared", "-fPIC", "-ffp-contract=fast", openmp, tuning))]
                error = _compile([*command, *flags, str(source), "-o", str(library)])
                if not error:
                    return _load(library, command, bool(openmp))
    raise NoCompilerError(f"{command[0]} does not compile it: {error}")


def _command() -> list[str]:
    named = shlex.split(os.environ.get("CC", ""))
    for command in (named, ["cc"], ["gcc"], ["clang"]):
        if command and shutil.which(command[0]):
            return command
        if command and command is named:
            break
    raise NoCompilerError(f"{named[0]} is not installed" if named else "no C compiler is installed (cc, gcc or clang)")


def _compile(command: list[str]) -> str:
    """The first line of error, "" where it worked."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if result.returncode == 0:
        return ""
    lines = [line for line in result.stderr.splitlines() if "error" in line] or ["no reason given"]
    return lines[0].strip()


def _load(path: Path, command: list[str], parallel: bool) -> Program:
    try:
        library = ctypes.CDLL(str(path))  # stays loaded when its file is removed
    except OSError as error:
        raise NoCompilerError(f"what {command[0]} compiled cannot be loaded: {error}") from error
    library.bench_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_size_t]
    library.bench_read.restype = ctypes.c_uint64
    for entry in (library.bench_multiply_add, library.bench_bfloat16):
        entry.argtypes = [ctypes.c_int64, ctypes.c_int]
        entry.restype = ctypes.c_float
    return Program(library, _version(command), library.bench_vector_bits(), parallel)


def _version(command: list[str]) -> str:
    try:
        text = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        text = ""
    return (text.strip().splitlines() or [command[0]])[0]
