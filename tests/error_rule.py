"""Rule 9 of the design: what counts as right."""

from __future__ import annotations

import torch

ULPS = 4
# Backward passes recompute weights as exp(score - lse): half an ulp of an lse of 4 to 16 is 2 to 8 ulp of a weight.
GRADIENT_ULPS = 8


def assert_as_exact(
    name: str,
    ours: torch.Tensor,
    torchs: torch.Tensor,
    oracle: torch.Tensor,
    ulps: int = ULPS,
    *,
    others: tuple = (),
    scale: float = 1.0,
) -> None:
    """The error of `ours` is at most twice that of PyTorch's own result in the same dtype, plus a few ulp.

    The ulp are those of the largest output, or of `scale`: the size of the terms where a result is a sum that may
    cancel. Where the oracle is not finite, ours is the same. `others` are further results of PyTorch, computed another
    way; the least exact of them counts.
    """
    assert ours.shape == oracle.shape, f"{name}: shape {tuple(ours.shape)}, wanted {tuple(oracle.shape)}"
    if oracle.numel() == 0:
        return
    ours64, torch64, oracle64 = ours.double(), torchs.double(), oracle.double()
    finite = oracle64.isfinite()
    assert torch.equal(ours64.isnan(), oracle64.isnan()), f"{name}: NaN elsewhere than the oracle"
    assert torch.equal(ours64[~finite].nan_to_num(), oracle64[~finite].nan_to_num()), f"{name}: infinities differ"
    if not finite.any():
        return
    error = (ours64 - oracle64)[finite].abs().max().item()
    results = (torch64, *(other.double() for other in others))
    theirs = max((other - oracle64)[finite].abs().nan_to_num(torch.inf).max().item() for other in results)
    bound = 2 * theirs + ulps * torch.finfo(ours.dtype).eps * max(scale, oracle64[finite].abs().max().item())
    assert error <= bound, f"{name}: error {error:.3g}, PyTorch's {theirs:.3g}, bound {bound:.3g}"
