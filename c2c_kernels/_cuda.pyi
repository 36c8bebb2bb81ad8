# The extension built from python_bindings/cuda.cpp, where nvcc was found. Lists hold the parameter structs of
# csrc/include/c2c.h as integers; results are statuses: the code in the low byte, segment + 1 above it.
from collections.abc import Callable

abi_version: int
archs: str
largest_dim: int
most_segments: int

def unavailable() -> str: ...
def error() -> str: ...
def attention_workspace(numbers: list[int]) -> int: ...
def merged_attention(numbers: list[int], scale: float, softcap: float, workspace: int, stream: int) -> int: ...
def attention_launches(
    numbers: list[int],
    scale: float,
    softcap: float,
    workspace: int,
    capability: int,
    function: Callable[[str, int, int, int, bytes], None],
) -> int: ...
