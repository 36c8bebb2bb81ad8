"""DESIGN.md 2.1 once more, token by token in Python floats: an oracle that shares no line with the reference."""

from __future__ import annotations

import math

import torch


def _rows(segment, batch, kv_head, token, which):
    """One projected sharer key or value as a list of floats."""
    raw = getattr(segment, which)
    if segment.index is not None:
        token = int(segment.index[batch, token])
    flat = []
    for head in range(raw.shape[1]):
        scale = getattr(segment, f"{which}_scale")
        factor = 1.0 if scale is None else float(scale[batch, head, token])
        flat.append([float(x) * factor for x in raw[batch, head, token]])
    proj, bias = getattr(segment, f"{which}_proj"), getattr(segment, f"{which}_bias")
    if proj is None:
        out = flat[kv_head]
    else:
        x = [value for head in flat for value in head]
        if isinstance(proj, tuple):
            x = [sum(float(a) * b for a, b in zip(row, x, strict=True)) for row in proj[1]]
            proj = proj[0]
        out = [sum(float(w) * b for w, b in zip(row, x, strict=True)) for row in proj[kv_head]]
    return out if bias is None else [o + float(b) for o, b in zip(out, bias[kv_head], strict=True)]


def attention(call: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, lse and mass of a call of `merged_attention` in float64."""
    query, key, value = call["query"], call["key"], call["value"]
    batch, q_heads, q_len, dim = query.shape
    length, group = key.shape[2], q_heads // key.shape[1]
    segments = call["segments"]
    out = torch.zeros(batch, q_heads, q_len, value.shape[3], dtype=torch.float64)
    lse = torch.full((batch, q_heads, q_len), -math.inf, dtype=torch.float64)
    mass = torch.zeros(batch, q_heads, q_len, 1 + len(segments), dtype=torch.float64)

    def cap(z):
        return z if call["softcap"] is None else call["softcap"] * math.tanh(z / call["softcap"])

    def score(q, k):
        return cap(sum(a * b for a, b in zip(q, k, strict=True)) * dim**-0.5)

    for b in range(batch):
        own = length if call["lengths"] is None else int(call["lengths"][b])
        for h in range(q_heads):
            for i in range(q_len):
                q = [float(x) for x in query[b, h, i]]
                here = own - q_len + i
                terms = []  # (run, score, gate, value)
                for j in range(own):
                    if call["is_causal"] and j > here:
                        continue
                    if call["window"] is not None and not j > here - call["window"]:
                        continue
                    z = score(q, [float(x) for x in key[b, h // group, j]])
                    mask = call["attn_mask"]
                    if mask is not None:
                        entry = mask.expand(batch, q_heads, q_len, length)[b, h, i, j]
                        if mask.dtype == torch.bool and not bool(entry):
                            continue
                        z += 0.0 if mask.dtype == torch.bool else float(entry)
                    terms.append((0, z, 1.0, [float(x) for x in value[b, h // group, j]]))
                at = here if call["query_positions"] is None else int(call["query_positions"][b, i])
                window = call["segment_window"] or call["window"]
                for s, segment in enumerate(segments):
                    count = segment.key.shape[2] if segment.index is None else segment.index.shape[-1]
                    for j in range(count if segment.lengths is None else int(segment.lengths[b])):
                        if segment.positions is not None:
                            position = int(segment.positions.expand(batch, count)[b, j])
                            if window is not None and not position > at - window:
                                continue
                            if segment.visibility == "causal" and position > at:
                                continue
                        gate = 1.0
                        if segment.gate is not None:
                            gate = float(segment.gate.expand(batch, q_heads, count)[b, h, j])
                        z = score(q, _rows(segment, b, h // group, j, "key"))
                        terms.append((1 + s, z, gate, _rows(segment, b, h // group, j, "value")))
                terms = [t for t in terms if t[2] > 0 and t[1] > -math.inf]
                sink = None if call["sinks"] is None else float(call["sinks"][h])
                if not terms and sink is None:
                    continue
                top = max([z for _, z, _, _ in terms] + ([] if sink is None else [sink]))
                total = sum(g * math.exp(z - top) for _, z, g, _ in terms)
                total += 0.0 if sink is None else math.exp(sink - top)
                lse[b, h, i] = top + math.log(total)
                for run, z, g, v in terms:
                    weight = g * math.exp(z - top) / total
                    mass[b, h, i, run] += weight
                    out[b, h, i] += weight * torch.tensor(v, dtype=torch.float64)
    return out, lse, mass
