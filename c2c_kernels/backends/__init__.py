"""The backends as records, and the choice among them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from dataclasses import dataclass
from types import ModuleType

import torch

logger = logging.getLogger("c2c_kernels")

ENVIRONMENT_VARIABLE = "C2C_BACKEND"


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    Attributes:
        name: "reference", "cpu", "triton", "cuda" or "flash-attn".
        available: whether it can run on this machine.
        reason: why not, "" where it is available.
        devices: torch device types that it runs on.
        dtypes: dtypes of queries and caches that it takes, as torch names them.
        isa: instruction set or architecture in use, "" where there is none.
        by_name: torch device types that it runs on only where it is asked for by name.
        verified: how its kernels were verified, for which architectures, where that was not on the hardware.
        least_capability: NVIDIA's compute capability that it needs, the number before the point.
    """

    name: str
    available: bool
    reason: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    isa: str = ""
    by_name: tuple[str, ...] = ()
    verified: str = ""
    least_capability: int = 0

    def refusal(self, device: torch.device, dtype: torch.dtype, named: bool = True) -> str:
        """Why this backend cannot take tensors of this device and dtype, asked for by name or not; "" where it can."""
        if not self.available:
            return self.reason
        if device.type in self.by_name and not named:
            return f"takes {device.type} tensors only where it is asked for by name"
        if device.type not in (*self.devices, *self.by_name) and "any" not in self.devices:
            return f"runs on {', '.join((*self.devices, *self.by_name))}, got {device.type}"
        if str(dtype).removeprefix("torch.") not in self.dtypes:
            return f"supports {', '.join(self.dtypes)}; got {str(dtype).removeprefix('torch.')}"
        if self.least_capability and device.type == "cuda" and not torch.version.hip:
            # Asked where there is a tensor on the device: a call on CPU tensors must not start CUDA.
            major, minor = torch.cuda.get_device_capability(device)
            if major < self.least_capability:
                return f"needs compute capability {self.least_capability}.0 or later; {device} has {major}.{minor}"
        return ""


_REFERENCE = Backend("reference", True, "", ("any",), ("float32", "float64", "bfloat16", "float16"))
_TRITON_VERIFIED = (
    "in Triton's interpreter; compiled ahead of time for sm_80, sm_90, sm_100 and gfx942; the PTX for sm_80 and sm_90 "
    "run in a simulator; not run on hardware"
)
_TRITONS_YES = ("1", "true", "yes", "on", "y")
_ASKED = ("cuda", "flash-attn")  # backends that are asked about every call
_records: tuple[Backend, ...] | None = None
_choices: dict[tuple, Backend] = {}
_said: set[tuple] = set()
_modules: dict[str, ModuleType] = {}


def backends() -> tuple[Backend, ...]:
    """The records of all backends, fastest first."""
    global _records
    if _records is None:
        from . import cuda, flash_attn, native

        _modules.update({"cuda": cuda, "flash-attn": flash_attn, "cpu": native})  # at hand where a traced call asks
        _records = (
            cuda.cuda_record(),
            triton_record(),
            flash_attn.flash_attn_record(),
            native.cpu_record(),
            _REFERENCE,
        )
    return _records


def triton_record() -> Backend:
    """The record of the `triton` backend, found without importing triton.

    With TRITON_INTERPRET=1 it runs in Triton's interpreter, slowly, on tensors of any device, where asked for by name.
    """

    def record(reason: str, devices: tuple[str, ...] = ("cuda",), isa: str = "", by_name: tuple[str, ...] = ()):
        dtypes = ("bfloat16", "float16", "float32")
        return Backend("triton", not reason, reason, devices, dtypes, isa, by_name, _TRITON_VERIFIED, 8)

    if importlib.util.find_spec("triton") is None:
        return record("triton is not installed: pip install 'c2c-kernels[triton]'")
    if os.environ.get("TRITON_INTERPRET", "").lower() in _TRITONS_YES:
        return record("", (), "interpreter", ("cpu", "cuda"))
    if not torch.cuda.is_available():
        return record("torch finds no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)")
    return record("")


def kernels(name: str) -> ModuleType:
    """The module whose functions run the operators on the backend `name`; that of triton is imported here."""
    if name not in _modules:
        _modules[name] = importlib.import_module(".triton" if name == "triton" else ".native", __name__)
    return _modules[name]


def choose(
    operator: str,
    name: str | None,
    device: torch.device,
    dtype: torch.dtype,
    native_refusal: str = "",
    call: tuple = (),
) -> Backend:
    """The backend for a call: the one asked for by argument or environment, else the fastest that can run it.

    `native_refusal` says why backends other than the reference cannot serve this call ("" where they can). `call` is
    what the `cuda` and `flash-attn` backends are asked about: the others run every call, or raise where they cannot.
    Raises ValueError for an unknown name, or for a named backend that cannot run the call.
    """
    if name is None:
        name = os.environ.get(ENVIRONMENT_VARIABLE) or None
    return _choose(operator, name, device, dtype, native_refusal, call)


def fastest(operator: str, device: torch.device, dtype: torch.dtype, call: tuple = ()) -> Backend:
    """The backend for a step of another one's call, whatever the environment asks for. Arguments as of `choose`."""
    return _choose(operator, None, device, dtype, "", call)


def _choose(
    operator: str, name: str | None, device: torch.device, dtype: torch.dtype, native_refusal: str, call: tuple
) -> Backend:
    first = backends()[0]
    first_refusal = ""
    if first.name in _ASKED and first.available and device.type in first.devices:
        first_refusal = _refusal_of_call(first, operator, name, device, dtype, call)
    request = (operator, name, device, dtype, first_refusal)
    remembered = not native_refusal and not torch.compiler.is_compiling()
    if remembered and request in _choices:
        return _choices[request]
    refusals: list[str] = []
    for record in backends():
        if name is not None and record.name != name:
            continue
        refusal = record.refusal(device, dtype, name is not None)
        if not refusal and record.name != "reference":
            refusal = native_refusal
        if not refusal and record.name in _ASKED:
            refusal = (
                first_refusal if record is first else _refusal_of_call(record, operator, name, device, dtype, call)
            )
            remembered = remembered and record is first  # a later call of this kind may get another answer
        if not refusal:
            if remembered:
                _choices[request] = record
            _say_once(operator, record.name, device, dtype, refusals)
            return record
        refusals.append(f"{record.name}: {refusal}")
    if name is not None and not refusals:
        raise ValueError(f"backend must be one of {', '.join(r.name for r in backends())}; got {name!r}")
    raise ValueError(f"{operator} cannot run on the backend asked for. {'; '.join(refusals)}")


def _refusal_of_call(
    record: Backend, operator: str, name: str | None, device: torch.device, dtype: torch.dtype, call: tuple
) -> str:
    """Why a backend of _ASKED does not take this call, where it takes tensors of this device and dtype."""
    if name not in (None, record.name) or record.refusal(device, dtype, name is not None):
        return ""
    return kernels(record.name).refusal(operator, name is not None, *call)


def _say_once(operator: str, name: str, device: torch.device, dtype: torch.dtype, refusals: list[str]) -> None:
    if torch.compiler.is_compiling() or not logger.isEnabledFor(logging.DEBUG):
        return
    said = (operator, name, device.type, dtype)
    if said not in _said:
        _said.add(said)
        passed = f" (passed over: {'; '.join(refusals)})" if refusals else ""
        logger.debug("%s runs on %s for %s tensors on %s%s", operator, name, dtype, device, passed)
