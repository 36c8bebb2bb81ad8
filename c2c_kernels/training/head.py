"""The loss over the vocabulary, in chunks of tokens: no more than one chunk's logits exist at any time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits of a chunk: 16 MB in float32, of which up to four copies exist.
_CHUNK = 1 << 22


class Head:
    """What makes logits of the receiver's last hidden states.

    Args:
        model: a Transformers causal language model.

    Raises:
        ValueError: for a model whose logits are not cap(W h + b).
    """

    def __init__(self, model: Any) -> None:
        layer = model.get_output_embeddings()
        self.weight: Tensor = layer.weight.detach()
        self.bias: Tensor | None = None if getattr(layer, "bias", None) is None else layer.bias.detach()
        self.softcap: float = getattr(model.config, "final_logit_softcapping", None) or 0.0
        with torch.no_grad():
            ids = torch.tensor([[int(model.config.bos_token_id or 0)]], device=model.device)
            wanted = model(input_ids=ids, use_cache=False).logits[0].float()
            came = self.logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
        # a few roundings of the model's dtype
        if not torch.allclose(came, wanted, rtol=0, atol=8 * torch.finfo(self.weight.dtype).eps * _largest(wanted)):
            raise ValueError(
                f"{type(model).__name__} makes its logits in another way than its output embeddings times the last "
                "hidden state: it cannot be trained for"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """(tokens, vocabulary) float32 of (tokens, width)."""
        z = torch.nn.functional.linear(hidden, self.weight, self.bias).float()
        return z if not self.softcap else torch.tanh(z / self.softcap) * self.softcap

    def slope(self, logits: Tensor) -> Tensor | None:
        """The derivative of the cap where there is one, from capped `logits`."""
        return 1 - (logits / self.softcap).square() if self.softcap else None

    def gradient(self, grad: Tensor) -> Tensor:
        """(tokens, width) float32 from (tokens, vocabulary), the gradient before the cap."""
        return (grad.to(self.weight.dtype) @ self.weight).float()


def head_loss(
    head: Head, hidden: Tensor, targets: Tensor, teacher: Tensor | None, distill: float
) -> tuple[Tensor, Tensor]:
    """mean over tokens of (1 - w) (-ln p[target]) + w sum q ln(q / p), and the mean of both terms alone.

    Args:
        head: makes p of `hidden` and q of `teacher`.
        hidden: (tokens, width), differentiable.
        targets: (tokens,) integers.
        teacher: (tokens, width) last hidden states of the receiver that has read the text; None where w is 0.
        distill: w.

    Returns:
        () float32 loss, and (2,) float32 (cross-entropy, KL), without gradient; KL is NaN without a teacher.
    """
    return _HeadLoss.apply(hidden, targets, teacher, distill, head)


class _HeadLoss(torch.autograd.Function):
    """dloss/dlogits = p - (1 - w) onehot - w q is known in the forward pass: nothing is computed twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, teacher: Tensor | None, distill: float, head: Head
    ) -> tuple[Tensor, Tensor]:
        wants, count = hidden.requires_grad, len(hidden)
        distill = 0.0 if teacher is None else distill
        grads = torch.empty(hidden.shape if wants else 0, dtype=torch.float32, device=hidden.device)
        entropy, divergence = (torch.zeros((), dtype=torch.float64, device=hidden.device) for _ in range(2))
        size = max(_CHUNK // len(head.weight), 1)
        for at in range(0, count, size):
            part = slice(at, at + size)
            wanted = targets[part, None]
            log_p = head.logits(hidden[part])
            slope = head.slope(log_p) if wants else None
            p = _normalised(log_p)
            entropy -= log_p.gather(1, wanted).double().sum()
            if teacher is not None:
                log_q = head.logits(teacher[part])
                q = _normalised(log_q)
                divergence += log_q.sub_(log_p).mul_(q).sum(-1).double().sum()
                if wants:
                    p.sub_(q, alpha=distill)
            if wants:
                p.scatter_add_(1, wanted, torch.full_like(wanted, distill - 1, dtype=p.dtype))
                grads[part] = head.gradient(p if slope is None else p.mul_(slope))
        if wants:
            ctx.save_for_backward(grads.div_(count).to(hidden.dtype))
        entropy, divergence = entropy / count, divergence / count
        if teacher is None:
            divergence = divergence * float("nan")
            loss = entropy
        else:
            loss = (1 - distill) * entropy + distill * divergence
        terms = torch.stack([entropy, divergence]).float()
        ctx.mark_non_differentiable(terms)
        return loss.float(), terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grads,) = ctx.saved_tensors
        return grads * grad_loss.to(grads.dtype), None, None, None, None


def _normalised(logits: Tensor) -> Tensor:
    """p of (tokens, vocabulary) float32; ln p takes the logits' place: one exponential and no other copy."""
    p = torch.exp(logits.sub_(logits.amax(dim=-1, keepdim=True)))
    total = p.sum(dim=-1, keepdim=True)
    logits.sub_(total.log())
    return p.div_(total)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max().clamp(min=1))
