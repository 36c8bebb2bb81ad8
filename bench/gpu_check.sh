#!/usr/bin/env bash
# Everything that only a GPU can tell, in under eight minutes: the kernels' tests on the device, then their times.
#
#   bench/gpu_check.sh            writes bench/results/<device>.json
#
# Needs Python (PYTHON names another than python3) with torch built for CUDA, triton, pytest and hypothesis; no network,
# and nothing is installed: the package is built in place. With pytest-xdist the tests take a third of the time; without
# nvcc the CUDA kernels are not built, and Triton's are tested and timed alone. Exit status 2: there is no GPU, or a
# package is missing, and nothing was done; 1: a test failed, a result was wrong, or time ran out.
#
# It has not been run on hardware yet. What it is made of is tested on the CPU: tests/bench/test_gpu*.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
deadline=470 # seconds for all
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if ! "$python" - <<'PY'; then exit 2; fi
import importlib.util
import sys

missing = [name for name in ("torch", "triton", "pytest", "hypothesis") if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu_check: {sys.executable} has no {', '.join(missing)}: nothing was done")
import torch

if not torch.cuda.is_available():
    sys.exit(f"gpu_check: torch {torch.__version__} finds no GPU: nothing was done")
major, minor = torch.cuda.get_device_capability()
if (major, minor) < (8, 0) and not torch.version.hip:
    sys.exit(f"gpu_check: compute capability {major}.{minor}; 8.0 or later is wanted: nothing was done")
print(f"gpu_check: {torch.cuda.get_device_name()}, sm_{major}{minor}, torch {torch.__version__}")
PY

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
within() { # SECONDS COMMAND...: stopped at the deadline too
    local left=$((deadline - SECONDS)) seconds=$1
    shift
    if [ "$left" -lt 1 ]; then echo "gpu_check: no time left for: $*" && return 124; fi
    timeout $((seconds < left ? seconds : left)) "$@"
}

echo "::: build"
if ! command -v nvcc >/dev/null; then echo "gpu_check: no nvcc on PATH: the CUDA kernels are not built; going on"; fi
if "$python" -c 'import pybind11, setuptools' 2>/dev/null; then
    arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
    C2C_CUDA_ARCHS=${C2C_CUDA_ARCHS:-$arch} within 150 "$python" setup.py -q build_ext --inplace ||
        echo "gpu_check: the compiled kernels are not built; going on"
else
    echo "gpu_check: no pybind11 or setuptools: the compiled kernels are not built; going on"
fi

echo "::: test"
spread=()
if "$python" -c 'import xdist' 2>/dev/null; then spread=(-n 3); fi
within 270 "$python" -m pytest -q -m gpu "${spread[@]}" --junitxml "$work/tests.xml" tests/triton_backend tests/cuda_backend \
    tests/test_flash_attn.py ||
    status=1

echo "::: bench"
within 200 "$python" -m c2c_kernels.cli bench --device cuda --quick --json "$work/bench.json" || status=1

"$python" bench/gpu_results.py --tests "$work/tests.xml" --bench "$work/bench.json" --seconds $SECONDS || status=1
exit $status
