"""Builds c2c_kernels._cpu out of csrc/cpu and python_bindings/cpu.cpp; all other packaging is in pyproject.toml.

Environment variables:
    C2C_CUDA=auto|0|1   the CUDA extension. This version has none: auto and 0 build the CPU kernels, 1 is an error
    C2C_SANITIZE=A,B    -fsanitize=A,B with -O1 and debug information, in a build folder of its own
    MAX_JOBS=N          files compiled at once (default: one per core)
    CXX, CXXFLAGS, LDFLAGS as for any C++ extension
Kernels choose their instruction sets inside their own files, so every file is compiled with the same flags.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

STANDARD = "-std=c++17"
COMMON = [
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
]
OPENMP_PROBE = """
#include <omp.h>
extern "C" int probe() {
    int n = 0;
    #pragma omp parallel reduction(+ : n)
    n += omp_get_thread_num();
    return n;
}
"""


def fail(message):
    raise SystemExit(f"c2c-kernels: {message}")


def check_cuda_choice():
    choice = os.environ.get("C2C_CUDA", "auto")
    if choice == "1":
        fail("C2C_CUDA=1 asks for the CUDA extension, which is not part of this version; use C2C_CUDA=auto or 0")
    if choice not in ("auto", "0"):
        fail(f"C2C_CUDA={choice!r} is not supported; use auto, 0 or 1")


def sanitizers():
    names = os.environ.get("C2C_SANITIZE", "")
    if names and not re.fullmatch(r"[a-z-]+(,[a-z-]+)*", names):
        fail(f"C2C_SANITIZE={names!r} is not a list such as address,undefined")
    return names


def optimisation():
    names = sanitizers()
    if names:
        return ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={names}", "-fno-sanitize-recover=all"]
    return ["-O3", "-g0"]


def jobs():
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    try:
        return max(1, int(os.environ.get("MAX_JOBS", cores)))
    except ValueError:
        fail(f"MAX_JOBS={os.environ['MAX_JOBS']!r} is not a number")


class BuildExt(build_ext):
    """build_ext that checks the compiler first, finds out about OpenMP, and compiles files in parallel."""

    def build_extensions(self):
        import pybind11
        from pybind11.setup_helpers import ParallelCompile

        if self.compiler.compiler_type != "unix":
            fail(f"needs gcc or clang; the {self.compiler.compiler_type} compiler is not supported")
        reason = self.refusal('extern "C" int probe() { return 0; }', [STANDARD])
        if reason:
            fail(f"needs a C++17 compiler (such as Debian's g++; CXX names another): {reason}")
        openmp = self.openmp_flags()
        for extension in self.extensions:
            extension.include_dirs.append(pybind11.get_include())
            extension.extra_compile_args += openmp["compile"]
            extension.extra_link_args += openmp["link"]
        ParallelCompile(default=jobs()).install()
        super().build_extensions()

    def refusal(self, code, flags):
        """None where the compiler builds a shared library from this code, else one line saying why not."""
        compiler = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
        if not shutil.which(compiler[0]):
            return f"{compiler[0]} is not installed"
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.cpp")
            with open(source, "w") as file:
                file.write(code)
            command = [*compiler, "-fPIC", *flags, "-shared", source, "-o", os.path.join(folder, "probe.so")]
            result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            return None
        lines = [line for line in result.stderr.splitlines() if "error" in line] or [f"{compiler[0]} failed"]
        return lines[0]

    def openmp_flags(self):
        """Flags with which the kernels run on torch's threads: torch loads its OpenMP library globally, and first.

        macOS: not linked at all, so that the symbols are looked up in the libomp that torch has loaded.
        """
        mac = sys.platform == "darwin"
        flags = ["-Xpreprocessor", "-fopenmp"] if mac else ["-fopenmp"]
        reason = self.refusal(OPENMP_PROBE, [*flags, *(["-undefined", "dynamic_lookup"] if mac else [])])
        if reason:
            print(f"c2c-kernels: built without OpenMP, so on one thread: {reason}", file=sys.stderr)
            return {"compile": [], "link": []}
        if not mac and not self.refusal("#ifndef __clang__\n#error\n#endif", []):
            print("c2c-kernels: clang's OpenMP has its own threads; g++ shares torch's (CXX=g++)", file=sys.stderr)
        return {"compile": flags, "link": [] if mac else flags}


check_cuda_choice()
setup(
    ext_modules=[
        Extension(
            "c2c_kernels._cpu",
            sources=["python_bindings/cpu.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
            depends=sorted(glob("csrc/**/*.*", recursive=True)),
            include_dirs=["csrc/include"],
            extra_compile_args=[STANDARD, *COMMON, *optimisation()],
            extra_link_args=optimisation() if sanitizers() else [],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildExt},
    options={"build": {"build_base": "build/sanitize"}} if sanitizers() else {},
)
