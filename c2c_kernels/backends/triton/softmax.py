"""The state of a running softmax, in base 2: what every attention kernel here keeps per row.

A state is (m, l, acc): m = max of the logits seen, l = sum exp2(logit - m), acc = sum exp2(logit - m) value. The empty
state is (-inf, 0, 0). A tile whose logits are all -inf leaves every bit of a state as it was: its weights are 0 and the
factor on what was there is exp2(0) = 1, and exp2(m - safe(m)) is 0 for a state that is still empty, never NaN.
Source: the online softmax of FlashAttention (arXiv 2205.14135).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-(2.0**127))  # of finite numbers in base 2: as lse and back it is exact


@triton.jit
def safe(m):
    """m: (rows,); the maximum to subtract: 0 where nothing has been seen."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def in_base_2(x):
    """A natural logarithm, of a mask or a sink, in base 2: what is finite stays so, finfo.min too."""
    return tl.where(x > -float("inf"), tl.maximum(x * LOG2E, LOWEST), x * LOG2E)


@triton.jit
def update(m, l, logits):
    """Takes in logits (rows, tokens). Returns the new m and l, the weights, and the factor for sums kept so far."""
    new = tl.maximum(m, tl.max(logits, 1))
    base = safe(new)
    weights = tl.exp2(logits - base[:, None])
    factor = tl.exp2(m - base)
    return new, l * factor + tl.sum(weights, 1), weights, factor


@triton.jit
def merge(m, l, m_other, l_other):
    """Two states' sums. Returns m and l of the union, and the factors for what either has kept."""
    new = tl.maximum(m, m_other)
    base = safe(new)
    factor, factor_other = tl.exp2(m - base), tl.exp2(m_other - base)
    return new, l * factor + l_other * factor_other, factor, factor_other


@triton.jit
def store_states(states, at, m, l, scale, inside):
    """States number `at` of `states`, four float32 each: (m, scale, l, 0), in one store of 16 bytes."""
    four = tl.join(tl.join(m, l), tl.join(scale, tl.zeros_like(l)))
    pointers = states + at[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(pointers, tl.reshape(four, (m.shape[0], 4)), mask=inside[:, None])


@triton.jit
def load_states(states, at, reference, inside):
    """What `store_states` has stored: the factor exp2(m - reference), l and scale; 0, 0 and 0 where not `inside`."""
    pointers = states + at[:, None] * 4 + tl.arange(0, 4)[None, :]
    four = tl.load(pointers, mask=inside[:, None], other=0.0)
    both, scales = tl.split(tl.reshape(four, (reference.shape[0], 2, 2)))
    m, l = tl.split(both)
    scale, _ = tl.split(scales)
    return tl.where(inside, tl.exp2(m - reference), 0.0), l, scale


@triton.jit
def finish(m, l):
    """The divisor (1 where nothing was seen) and lse = ln sum exp(logit), natural, -inf where nothing was seen."""
    empty = l == 0.0
    divisor = tl.where(empty, 1.0, l)
    return divisor, tl.where(empty, -float("inf"), (m + tl.log2(divisor)) * LN2)


@triton.jit
def tanh(x):
    """tanh to 1.3 ulp below 0.6 (odd polynomial, fitted by least squares at Chebyshev nodes), 2 ulp above."""
    z = x * x
    p = ((((0.00237349 * z - 0.00841253) * z + 0.0217891) * z - 0.05396165) * z + 0.13333313) * z - 0.33333333
    size = tl.minimum(tl.abs(x), 30.0)
    large = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    far = tl.where(x < 0.0, -large, large)
    return tl.where(tl.abs(x) < 0.6, x + x * z * p, tl.where(x == x, far, x))


@triton.jit
def capped(scores, scale, softcap, SOFTCAP: tl.constexpr):
    """Logits in base 2 of raw products: cap(scale * scores) * log2 e."""
    if SOFTCAP:
        return tanh(scores * (scale / softcap)) * (softcap * LOG2E)
    else:
        return scores * (scale * LOG2E)
