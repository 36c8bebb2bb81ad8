"""The package as it is installed: names, imports, build switches, source distribution, C ABI, threads."""

import importlib.metadata
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import c2c_kernels

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = ["SharerSegment", "backends", "merge_states", "merged_attention", "project_kv"]


def run(command, cwd, **env):
    """Runs a command away from the source folder, which has no compiled extension, and returns its result."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=600,
    )


def python(code, cwd, **env):
    """What a fresh interpreter prints, as JSON."""
    result = run([sys.executable, "-c", code], cwd, **env)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def setup_py(*arguments, **env):
    return run([sys.executable, ROOT / "setup.py", *arguments], ROOT, **env)


class TestInstalled:
    def test_version_is_the_distributions(self):
        assert c2c_kernels.__version__ == importlib.metadata.version("c2c-kernels")

    def test_the_package_under_test_is_not_the_source_folder(self):
        """A source folder without the extension would silently test the reference alone."""
        from c2c_kernels import _cpu

        assert Path(_cpu.__file__).parent == Path(c2c_kernels.__file__).parent

    @pytest.mark.parametrize("name", PUBLIC)
    def test_public_name_is_exported_and_documented(self, name):
        assert name in c2c_kernels.__all__
        assert getattr(c2c_kernels, name).__doc__

    def test_every_exported_name_exists(self):
        assert [name for name in c2c_kernels.__all__ if not hasattr(c2c_kernels, name)] == []

    @pytest.mark.parametrize("name", PUBLIC)
    def test_public_signature_is_annotated(self, name):
        """What mypy then checks; a function without annotations it passes over."""
        item = getattr(c2c_kernels, name)
        functions = [item] if inspect.isfunction(item) else []
        if inspect.isclass(item):
            functions = [f for n, f in vars(item).items() if inspect.isfunction(f) and (n == "__init__" or n[0] != "_")]
        for function in functions:
            missing = {*inspect.signature(function).parameters, "return"} - {*function.__annotations__, "self"}
            assert missing == set(), function.__qualname__

    def test_torch_is_the_only_requirement(self):
        requirements = importlib.metadata.requires("c2c-kernels")
        assert [line for line in requirements if "extra ==" not in line] == ["torch>=2.10"]

    def test_is_typed_and_licensed(self):
        assert (Path(c2c_kernels.__file__).parent / "py.typed").exists()
        metadata = importlib.metadata.metadata("c2c-kernels")
        assert metadata["License-Expression"] == "Apache-2.0"
        assert "Apache License" in importlib.metadata.distribution("c2c-kernels").read_text("licenses/LICENSE")

    def test_command_is_installed(self):
        (entry,) = importlib.metadata.entry_points(group="console_scripts", name="c2c-kernels")
        assert callable(entry.load())


class TestImport:
    def test_brings_in_nothing_but_torch(self, tmp_path):
        code = """if True:
            import json, sys, torch
            before = set(sys.modules)
            import c2c_kernels
            new = {name.partition(".")[0] for name in set(sys.modules) - before}
            print(json.dumps(sorted(new - set(sys.stdlib_module_names))))"""
        assert set(python(code, tmp_path)) <= {"c2c_kernels", "functorch", "torch"}

    def test_takes_under_50_ms_beyond_torch(self, tmp_path):
        """Processor time, the shortest of five: what other processes and a cold disk add is not the package's."""
        code = """if True:
            import time, torch
            start = time.process_time()
            import c2c_kernels
            print(time.process_time() - start)"""
        seconds = [python(code, tmp_path) for _ in range(5)]
        assert min(seconds) < 0.05, seconds

    def test_extension_needs_no_torch(self, tmp_path):
        """One build works with every torch: pointers and strides cross the binding, never a tensor."""
        code = """if True:
            import importlib.util, json, sys
            spec = importlib.util.spec_from_file_location("_cpu", sys.argv[1])
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
            print(json.dumps("torch" in sys.modules))"""
        from c2c_kernels import _cpu

        result = run([sys.executable, "-c", code, _cpu.__file__], tmp_path)
        assert (result.returncode, result.stdout.strip()) == (0, "false"), result.stderr


class TestBuildSwitches:
    @pytest.mark.parametrize("choice", ["auto", "0"])
    def test_cuda_choice_that_needs_no_nvcc(self, choice):
        result = setup_py("--version", C2C_CUDA=choice)
        assert result.stdout.split()[-1:] == [c2c_kernels.__version__], result.stderr

    @pytest.mark.parametrize(
        ("variable", "value", "message"),
        [
            ("C2C_CUDA_ARCHS", "70,80", "C2C_CUDA_ARCHS='70,80' is not a list of compute capabilities from 80 on"),
            ("C2C_CUDA", "yes", "C2C_CUDA='yes' is not supported; use auto, 0 or 1"),
            ("C2C_SANITIZE", "-O3", "C2C_SANITIZE='-O3' is not a list such as address,undefined"),
        ],
    )
    def test_bad_value_is_one_clear_line(self, variable, value, message):
        result = setup_py("--version", **{variable: value})
        assert result.returncode != 0
        assert re.fullmatch(rf"c2c-kernels: .*{re.escape(message)}.*\n", result.stderr)

    def test_architectures_in_any_order(self, tmp_path):
        """PTX is of the earliest, which all others run."""
        nvcc, said = tmp_path / "nvcc", tmp_path / "said"
        nvcc.write_text(f'#!/bin/sh\necho "$*" >> {said}; exit 1\n')
        nvcc.chmod(0o755)
        folders = ["--build-temp", tmp_path, "--build-lib", tmp_path]
        setup_py("build_ext", *folders, C2C_CUDA="1", C2C_CUDA_ARCHS="100,80,90", NVCC=nvcc)
        assert "arch=compute_80,code=[sm_80,sm_90,sm_100,compute_80]" in said.read_text()

    def test_cuda_asked_for_without_nvcc_is_one_clear_line(self, tmp_path):
        folders = ["--build-temp", tmp_path, "--build-lib", tmp_path]
        result = setup_py("build_ext", *folders, C2C_CUDA="1", NVCC=tmp_path / "nvcc")
        assert result.returncode != 0
        assert result.stderr.splitlines()[-1].startswith("c2c-kernels: C2C_CUDA=1 asks for the CUDA extension: ")
        assert "Traceback" not in result.stderr

    def test_an_architecture_that_nvcc_does_not_know(self, tmp_path):
        """As nvcc of CUDA 12.4 answers where it is asked for sm_120: CUDA is left out, or the build an error."""
        nvcc = tmp_path / "nvcc"
        told = "nvcc fatal   : Unsupported gpu architecture 'compute_120'"
        nvcc.write_text(f'#!/bin/sh\ncase "$*" in *sm_120*) echo "{told}" >&2; exit 1;; esac\n')
        nvcc.chmod(0o755)
        folders = ["--build-temp", tmp_path, "--build-lib", tmp_path]
        refused = setup_py("build_ext", *folders, C2C_CUDA="1", C2C_CUDA_ARCHS="80,120", NVCC=nvcc)
        assert refused.returncode != 0
        assert refused.stderr.splitlines()[-1] == f"c2c-kernels: C2C_CUDA=1 asks for the CUDA extension: {told}"
        code = f"""if True:
            import runpy, setuptools
            setuptools.setup = lambda **options: None
            made = runpy.run_path({str(ROOT / "setup.py")!r})
            build = made["BuildExt"](setuptools.Distribution())
            build.extensions = extensions = made["extensions"]()
            build.prepare_cuda(extensions[-1])
            print([each.name for each in build.extensions])"""
        left_out = run([sys.executable, "-c", code], ROOT, C2C_CUDA_ARCHS="80,120", NVCC=nvcc, C2C_CUDA="auto")
        assert left_out.stdout.strip() == "['c2c_kernels._cpu']", left_out.stderr
        assert left_out.stderr.strip() == f"c2c-kernels: built without CUDA kernels: {told}"

    @pytest.mark.parametrize(("archs", "wanted"), [("80,90", "[True, False]"), ("80,100", "[False, False]")])
    def test_code_for_sm_90a_is_made_of_its_files_alone(self, archs, wanted):
        code = f"""if True:
            import runpy, setuptools
            setuptools.setup = lambda **options: None
            made = runpy.run_path({str(ROOT / "setup.py")!r})
            flags = [made["Nvcc"]().flags_of(name, made["cuda_archs"]()) for name in ("prefill_wgmma.cu", "decode.cu")]
            print(["arch=compute_90a,code=sm_90a" in each and "-DC2C_SM_90A" in each for each in flags])"""
        told = run([sys.executable, "-c", code], ROOT, C2C_CUDA_ARCHS=archs)
        assert told.stdout.strip() == wanted, told.stderr

    @pytest.mark.parametrize(("name", "wanted"), [
        ("prefill_large", ["80", "87", "100"]), ("prefill_small", ["86", "89", "120"]),
        ("decode", ["80", "86", "87", "89", "90", "100", "120"]),
    ])  # fmt: skip
    def test_code_is_made_for_architectures_that_launch_it(self, name, wanted):
        """What they launch: tests/cuda_backend/test_choice.py. PTX is there for later ones."""
        code = f"""if True:
            import json, runpy, setuptools
            setuptools.setup = lambda **options: None
            made = runpy.run_path({str(ROOT / "setup.py")!r})
            print(json.dumps(made["Nvcc"]().flags_of("csrc/cuda/{name}.cu", made["cuda_archs"]())[-1]))"""
        told = run([sys.executable, "-c", code], ROOT, C2C_CUDA_ARCHS="80,86,87,89,90,100,120")
        codes = ",".join([*(f"sm_{arch}" for arch in wanted), "compute_80"])
        assert json.loads(told.stdout) == f"arch=compute_80,code=[{codes}]", told.stderr

    def test_missing_compiler_is_one_clear_line(self, tmp_path):
        folders = ["--build-temp", tmp_path, "--build-lib", tmp_path]
        result = setup_py("build_ext", *folders, CC="no-such-compiler", CXX="no-such-compiler")
        assert result.returncode != 0
        assert result.stderr.splitlines()[-1].startswith("c2c-kernels: needs a C++17 compiler")
        assert "Traceback" not in result.stderr


def test_source_distribution_is_complete(tmp_path):
    """Everything that building and testing needs, and nothing that was built."""
    skip = shutil.ignore_patterns(".git", "*.egg-info", "__pycache__", "shared", ".*_cache", ".hypothesis", "*.so")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=lambda folder, names: {*skip(folder, names), *({"build"} & set(names))})
    (source / "csrc" / "cpu" / "left_over.o").touch()
    (source / "c2c_kernels" / "_cpu.cpython-311-x86_64-linux-gnu.so").touch()
    result = run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, source], tmp_path)
    assert result.returncode == 0, result.stderr + result.stdout
    archive = tmp_path / f"c2c_kernels-{c2c_kernels.__version__}.tar.gz"
    with tarfile.open(archive) as file:
        packed = {member.name.partition("/")[2] for member in file if member.isfile()}
    folders = ["c2c_kernels", "csrc", "python_bindings", "tests", "examples", ".ci"]
    wanted = {
        path.relative_to(source).as_posix()
        for folder in folders
        for path in (source / folder).rglob("*")
        if path.is_file() and path.suffix not in {".o", ".so"}
    }
    wanted |= {"README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "pyproject.toml", "setup.py"}
    assert wanted - packed == set()
    assert [name for name in packed if name.endswith((".o", ".so", ".pyc"))] == []


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    missing = [tool for tool in ("make", "cc", "c++", "nm", "objdump") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("kernels")
    command = ["make", "-j2", "-C", ROOT / "examples" / "c", f"BUILD={folder}", "CC=cc", "CXX=c++", "CXXFLAGS=-O1"]
    result = run([*command, folder / "merged_attention"], folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
class TestKernelsAlone:
    """`csrc` built as a C or C++ program would: no Python, no torch."""

    def test_c_example_runs(self, build):
        assert len((ROOT / "examples" / "c" / "merged_attention.c").read_text().splitlines()) < 60
        result = run([build / "merged_attention"], build)
        line = r"\w+: largest error \d\.\de-\d+, share of the sharer in head 0 0\.\d+\n"
        assert re.fullmatch(line, result.stdout), result.stdout
        assert result.returncode == 0
        if sys.platform == "linux":
            needed = run(["ldd", build / "merged_attention"], build).stdout
            assert not re.search("torch|python", needed)

    def test_cpp_example_runs(self, build):
        """A sharer's cache becomes a slice of a receiver's, by its kernels alone."""
        folder = ROOT / "examples" / "cpp"
        made = run(["make", "-C", folder, f"BUILD={build}", "CC=cc", "CXX=c++", build / "convert_cache"], build)
        assert made.returncode == 0, made.stderr
        result = run([build / "convert_cache"], build)
        line = r"\w+: 77 tokens converted, largest error \d\.\de-\d+ of the largest number, rest untouched\n"
        assert re.fullmatch(line, result.stdout), result.stdout
        assert result.returncode == 0

    @pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
    @pytest.mark.skipif("C2C_EVERY_TARGET" not in os.environ, reason="compiles for minutes: C2C_EVERY_TARGET=1 runs it")
    def test_cpp_example_with_the_cuda_kernels(self, build):
        """Compiled and linked, to PTX alone; without a GPU it says what it misses."""
        program, options = build / "convert_cache_cuda", [f"BUILD={build}", "CC=cc", "CXX=c++", "ARCH=compute_80"]
        made = run(["make", "-j2", "-C", ROOT / "examples" / "cpp", *options, program], build)
        assert made.returncode == 0, made.stderr
        result = run([program], build)
        if result.returncode:
            assert re.fullmatch(r"no device: .*\n", result.stderr), result.stderr
        else:
            assert re.match("cuda: 77 tokens converted", result.stdout), result.stdout

    @pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="reads x86 instructions")
    def test_instruction_sets_share_no_inline_function(self, build):
        """Of several copies the linker keeps one: if that uses AVX, the baseline kernels would call it too."""
        owners = {}
        for file in sorted(build.glob("*.o")):
            lines = run(["nm", "--defined-only", file], build).stdout.splitlines()
            for kind, name in (line.split()[-2:] for line in lines):
                if kind == "W":
                    owners.setdefault(name, []).append(file)
        assert owners  # -O1 leaves some
        dangerous = {
            (name, file.name)
            for name, files in owners.items()
            for file in files
            if len(files) > 1
            and re.search(r"\sv\w+ .*%[xyz]mm", run(["objdump", "-d", "-j", f".text.{name}", file], build).stdout)
        }
        assert dangerous == set()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
class TestThreads:
    """The kernels run on the threads that torch has, as many as torch.set_num_threads says."""

    PRELUDE = """if True:
        import json, os, torch, c2c_kernels
        def threads(): return len(os.listdir("/proc/self/task"))
        def torch_work(): torch.ones(1 << 22).exp_()
        def kernel_work():
            query, cache = torch.ones(1, 8, 64, 64), torch.ones(1, 8, 512, 64)
            c2c_kernels.merged_attention(query, cache, cache, backend="cpu")
        """

    def test_pool_is_torchs(self, tmp_path):
        code = """
        torch.set_num_threads(3)
        torch_work()
        before = threads()
        kernel_work()
        print(json.dumps(threads() - before))"""
        assert python(self.PRELUDE + code, tmp_path) == 0

    def test_kernels_start_as_many_threads_as_torch_would(self, tmp_path):
        code = """
        counts = []
        for number in (1, 3):
            torch.set_num_threads(number)
            before = threads()
            kernel_work()
            counts.append(threads() - before)
        before = threads()
        torch_work()
        print(json.dumps([*counts, threads() - before]))"""
        assert python(self.PRELUDE + code, tmp_path) == [0, 2, 0]
