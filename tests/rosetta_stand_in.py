"""Modules with the names, attributes and parameters of rosetta's, for what looks at a live model by those."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class _Block(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.w1, self.w2 = nn.Linear(hidden, inner, bias=False), nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return x + self.w2(F.gelu(self.w1(self.norm(x))))


class _Blocks(nn.Module):
    def __init__(self, hidden: int, inner: int, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(hidden, inner) for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class C2CProjector(nn.Module):
    def __init__(
        self, source_dim, target_dim, source_num_heads=1, target_num_heads=1, intermediate_dim=1024, hidden_dim=1024,
        num_layers=3, dropout=0.1,
    ):  # fmt: skip
        super().__init__()
        self.source_dim, self.target_dim = source_dim, target_dim
        self.source_num_heads, self.target_num_heads = source_num_heads, target_num_heads
        raw, own = source_dim * source_num_heads, target_dim * target_num_heads
        for half in ("key", "value"):
            self.add_module(f"{half}_in", nn.Linear(raw + own, hidden_dim))
            self.add_module(f"{half}_mlp1", _Blocks(hidden_dim, intermediate_dim, 1))
            self.add_module(f"{half}_scalar_mlp2", _Blocks(hidden_dim, hidden_dim, 1))
            self.add_module(f"{half}_scalar_head", nn.Linear(hidden_dim, target_num_heads))
            self.add_module(f"{half}_proj_mlp2", _Blocks(hidden_dim, intermediate_dim, num_layers - 2))
            self.add_module(f"{half}_proj_out", nn.Linear(hidden_dim, own))
            self.register_parameter(f"{half}_gate_logit", nn.Parameter(torch.tensor(0.0)))
        self.use_gumbel = True
        self.register_buffer("gate_temperature", torch.tensor(1.0))
        self.own_calls = 0

    def forward(self, source_kv, target_kv, position_ids=None, max_pos=None):
        self.own_calls += 1
        fused = []
        for half, source, target in zip(("key", "value"), source_kv, target_kv, strict=True):
            of = lambda part, half=half: getattr(self, f"{half}_{part}")  # noqa: E731
            x = torch.cat([source.transpose(1, 2).flatten(2), target.transpose(1, 2).flatten(2)], dim=-1)
            hidden = of("mlp1")(of("in")(x))
            projected = of("proj_out")(of("proj_mlp2")(hidden)).unflatten(-1, target.shape[1::2]).transpose(1, 2)
            weight = torch.sigmoid(of("scalar_head")(of("scalar_mlp2")(hidden))).transpose(1, 2).unsqueeze(-1)
            fused.append(target + (of("gate_logit") > 0).float() * weight * projected)
        return tuple(fused)


class AllInOneProjector(nn.Module):
    pass


class RosettaModel(nn.Module):
    def __init__(self, projectors) -> None:
        super().__init__()
        self.projector_list = nn.ModuleList(projectors)
