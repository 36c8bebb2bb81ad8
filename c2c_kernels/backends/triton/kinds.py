"""Where the fields of `arguments.Kind` lie in its code, as digits to the base 4: `code // GATE_AT % 4` is the gate."""

import triton.language as tl

from .arguments import Kind

POSITIONS_AT, CAUSAL_AT, WINDOW_AT, GATE_AT, MASK_AT, KEY_E4M3_AT, VALUE_E4M3_AT, WIDE_AT, ABSORBED_AT, _, ALIGN_AT = (
    tl.constexpr(4**place) for place in range(len(Kind._fields))
)
