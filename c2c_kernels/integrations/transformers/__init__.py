"""Merged attention in Hugging Face models: a receiver reads sharers' caches in every attention layer.

    from c2c_kernels.integrations import transformers as c2c_hf

    sharer_cache = DynamicCache()                    # without a config, or sliding layers come truncated
    sharer(document_ids, past_key_values=sharer_cache)
    context = c2c_hf.SharedContext.from_caches(sharer_cache)
    c2c_hf.enable(receiver)
    with c2c_hf.session(receiver, context):
        receiver.generate(question_ids)

A context reaches a forward pass in one of three ways, the first of which wins: `receiver(..., c2c=context)`, where
`c2c=None` means none; a cache that carries one (`context.attach(cache)`); the innermost open `session`. A forward
pre-hook on the enabled model picks it up, so it acts on `receiver(...)` and `receiver.generate(...)`. Calling
`receiver.forward(...)` or an inner module directly bypasses the hook, which raises while a session is open. A session
belongs to the thread that opens it: another thread sees none, also one started inside.

The receiver's position ids, given or built as `generate` builds them, are moved by the context's `position_offset`.

With `output_attentions=True` (served by the reference backend) the weights of a layer are those of the own tokens,
as eager attention gives them, followed by those of every segment's tokens: (batch, q_heads, q_len, len + all segments).
`config.output_attentions = True` does the same where it is set before `enable`; later Transformers refuses to set it.

A sharer of another kind needs a `c2c_kernels.CacheProjector`: `project_text`, or `projected_context` for a cache that
is there already.

Rotary scalings that change with the text's length (dynamic NTK, LongRoPE) are exact while sharer and receiver stay on
the same side of the change, as for any cache. Checked against Transformers 5.23 (DESIGN.md 2.4).
"""

from c2c_kernels.integrations.transformers.attention import MassRecord
from c2c_kernels.integrations.transformers.context import SharedContext
from c2c_kernels.integrations.transformers.patch import disable, enable, record_mass, session
from c2c_kernels.integrations.transformers.projected import (
    cache_shape,
    project_text,
    projected_context,
    read_tokens,
)

__all__ = [
    "MassRecord",
    "SharedContext",
    "cache_shape",
    "disable",
    "enable",
    "project_text",
    "projected_context",
    "read_tokens",
    "record_mass",
    "session",
]
