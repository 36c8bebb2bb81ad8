"""Builds c2c_kernels._cpu and, where nvcc is found, c2c_kernels._cuda; all other packaging is in pyproject.toml.

Environment variables:
    C2C_CUDA=auto|0|1   the CUDA extension: where nvcc works (the default), never, or an error where it does not
    C2C_CUDA_ARCHS=A,B  compute capabilities to compile for (default: 80,86,89,90,100,120); PTX of the first is added,
                        and with 90 the kernels of sm_90a
    NVCC=PATH           the CUDA compiler (default: nvcc on PATH, or in $CUDA_HOME/bin)
    C2C_SANITIZE=A,B    -fsanitize=A,B with -O1 and line numbers, in a build folder of its own
    MAX_JOBS=N          files compiled at once (default: one per core)
    CXX, CXXFLAGS, LDFLAGS as for any C++ extension
Kernels choose their instruction sets inside their own files, so every file is compiled with the same flags.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

STANDARD = "-std=c++17"
CUDA_ARCHS = "80,86,89,90,100,120"
COMMON = [
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
]
NVCC_FLAGS = [STANDARD, "-O3", "-Icsrc/include", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin", "-compress-all"]
OPENMP_PROBE = """
#include <omp.h>
extern "C" int probe() {
    int n = 0;
    #pragma omp parallel reduction(+ : n)
    n += omp_get_thread_num();
    return n;
}
"""
# Kernels take structs of more than the 4 KiB that CUDA 12.0 and devices before sm_70 allow.
CUDA_PROBE = """
#include <cuda_runtime.h>
struct Large {
    char bytes[5000];
};
__global__ void probe(const __grid_constant__ Large large, char *out) { *out = large.bytes[threadIdx.x]; }
"""


def fail(message):
    raise SystemExit(f"c2c-kernels: {message}")


def cuda_choice():
    choice = os.environ.get("C2C_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        fail(f"C2C_CUDA={choice!r} is not supported; use auto, 0 or 1")
    return choice


def cuda_archs():
    archs = re.split(r"[,; ]+", os.environ.get("C2C_CUDA_ARCHS", "").strip() or CUDA_ARCHS)
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}", arch) or int(arch) < 80:
            fail(f"C2C_CUDA_ARCHS={','.join(archs)!r} is not a list of compute capabilities from 80 on, such as 80,90")
    return sorted(set(archs), key=int)  # PTX of the first serves all later ones


def launching(source, archs):
    """The architectures that launch a file's kernels: *_large.cu needs blocks of 163 KiB of shared memory, *_small.cu
    is for those whose blocks have 99 (csrc/cuda/launch.h), and prefill of 90 has kernels of its own."""
    name = os.path.basename(source)
    large = [arch for arch in archs if arch not in ("86", "89") and int(arch) < 120]
    if name == "prefill_large.cu":
        return [arch for arch in large if arch != "90"]
    if name.endswith("_small.cu"):
        return [arch for arch in archs if arch not in large]
    return large if name.endswith("_large.cu") else archs


class Nvcc:
    """The CUDA compiler. Objects are kept in build/cuda, named by what they are made of."""

    def __init__(self):
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        beside = os.path.join(home, "bin", "nvcc") if home else None
        self.path = os.environ.get("NVCC") or shutil.which("nvcc") or (shutil.which(beside) if beside else None)
        self.version, self.include_dirs, self.library_dirs = "", [], []

    def refusal(self, archs):
        """None where it compiles for these, else one line saying why not. Finds out where the CUDA runtime is."""
        if not self.path:
            return "nvcc is not on PATH"
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.cu")
            with open(source, "w") as file:
                file.write(CUDA_PROBE)
            command = [self.path, *self.flags(archs), source, "-c", "-o", os.path.join(folder, "probe.o")]
            try:
                result = subprocess.run(command, capture_output=True, text=True)
                told = subprocess.run([*command, "-dryrun"], capture_output=True, text=True).stderr
                version = subprocess.run([self.path, "--version"], capture_output=True, text=True)
            except OSError as error:
                return f"{self.path}: {error}"
        if result.returncode:
            lines = (result.stdout + result.stderr).splitlines()
            return ([line for line in lines if "error" in line or "fatal" in line] or lines or [f"{self.path} failed"])[
                0
            ]
        self.version = version.stdout + version.stderr
        for name, option, found in (("INCLUDES", "-I", self.include_dirs), ("LIBRARIES", "-L", self.library_dirs)):
            for line in re.findall(rf"#\$ {name}=(.*)", told):
                found += re.findall(rf'{option}([^" ]+)', line)
        return None

    def flags(self, archs, launching=None):
        """Of PTX for the first of these, and code for those that launch a file's kernels (default: all)."""
        codes = [f"sm_{arch}" for arch in (archs if launching is None else launching)]
        return [*NVCC_FLAGS, "-gencode", f"arch=compute_{archs[0]},code=[{','.join([*codes, f'compute_{archs[0]}'])}]"]

    def flags_of(self, source, archs):
        """Files *_wgmma.cu have code for sm_90a, which no other architecture runs; without 90, kernels left empty."""
        if source.endswith("_wgmma.cu") and "90" in archs:
            return [*NVCC_FLAGS, "-gencode", "arch=compute_90a,code=sm_90a", "-DC2C_SM_90A"]
        return self.flags(archs, launching(source, archs))

    def objects(self, sources, archs):
        """Compiles the sources, as many at once as there are jobs, and returns the objects. After `refusal`."""
        flags = [flag for source in sources for flag in self.flags_of(source, archs)]
        digest = hashlib.sha256(" ".join([self.path, self.version, *flags]).encode())
        for path in sorted([*glob("csrc/cuda/*"), *glob("csrc/include/*")]):
            with open(path, "rb") as file:
                digest.update(file.read())
        folder = os.path.join("build", "cuda", digest.hexdigest()[:16])
        os.makedirs(folder, exist_ok=True)

        def compiled(source):
            made = os.path.join(folder, os.path.basename(source) + ".o")
            if not os.path.exists(made):
                command = [self.path, *self.flags_of(source, archs), "-c", source, "-o", made + ".part"]
                print(" ".join(command), flush=True)
                subprocess.run(command, check=True)
                os.replace(made + ".part", made)
            return made

        with ThreadPoolExecutor(jobs()) as pool:
            return list(pool.map(compiled, sources))


def headers(folder):
    return sorted([*glob(f"csrc/{folder}/*"), *glob("csrc/include/*"), *glob("python_bindings/*.h")])


def extensions():
    cpu = Extension(
        "c2c_kernels._cpu",
        sources=["python_bindings/cpu.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        depends=headers("cpu"),
        include_dirs=["csrc/include"],
        extra_compile_args=[STANDARD, *COMMON, *optimisation()],
        extra_link_args=optimisation() if sanitizers() else [],
        language="c++",
    )
    if cuda_choice() == "0" or sanitizers():
        return [cpu]
    cuda = Extension(
        "c2c_kernels._cuda",
        sources=["python_bindings/cuda.cpp", *sorted(glob("csrc/cuda/*.cpp"))],
        depends=headers("cuda"),
        include_dirs=["csrc/include"],
        define_macros=[("C2C_CUDA_ARCHS", f'"{",".join(cuda_archs())}"')],
        extra_compile_args=[STANDARD, *COMMON, *optimisation()],
        libraries=["cudart_static", "pthread", "dl", "rt"],
        language="c++",
    )
    return [cpu, cuda]


def sanitizers():
    names = os.environ.get("C2C_SANITIZE", "")
    if names and not re.fullmatch(r"[a-z-]+(,[a-z-]+)*", names):
        fail(f"C2C_SANITIZE={names!r} is not a list such as address,undefined")
    return names


def optimisation():
    names = sanitizers()
    if names:
        return ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={names}", "-fno-sanitize-recover=all"]
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
        for extension in list(self.extensions):
            extension.include_dirs.append(pybind11.get_include())
            if extension.name.endswith("_cuda"):
                self.prepare_cuda(extension)
            else:
                extension.extra_compile_args += openmp["compile"]
                extension.extra_link_args += openmp["link"]
        ParallelCompile(default=jobs()).install()
        super().build_extensions()

    def prepare_cuda(self, extension):
        """Compiles what nvcc compiles; without one the extension is left out, unless C2C_CUDA=1 asks for it."""
        nvcc = Nvcc()
        reason = nvcc.refusal(cuda_archs())
        if not reason:
            extension.extra_objects = nvcc.objects(sorted(glob("csrc/cuda/*.cu")), cuda_archs())
            extension.include_dirs += nvcc.include_dirs
            extension.library_dirs += nvcc.library_dirs
            return
        if cuda_choice() == "1":
            fail(f"C2C_CUDA=1 asks for the CUDA extension: {reason}")
        print(f"c2c-kernels: built without CUDA kernels: {reason}", file=sys.stderr)
        self.extensions.remove(extension)

    def get_outputs(self):
        """The files that exist: an extension that was left out is no output."""
        return [path for path in super().get_outputs() if os.path.exists(path)]

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


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt},
    options={"build": {"build_base": "build/sanitize"}} if sanitizers() else {},
)
