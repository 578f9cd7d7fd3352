"""Optimiser: Muon for the matrices inside the layers, AdamW for everything else.

Muon (Jordan et al., 2024): momentum, then the nearest orthogonal matrix by five Newton-Schulz steps. The update is
scaled by 0.2 sqrt(max(rows, columns)), which gives it the root-mean-square of an AdamW update (Liu et al., "Muon is
scalable for LLM training", 2025), so that both optimisers share the scale of learning rates.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2


def orthogonalize(x_PMN: Tensor, steps: int = 5) -> Tensor:
    """Approximate polar factors of a batch of matrices with M <= N, in BF16 on the GPU."""
    a, b, c = NEWTON_SCHULZ
    x = x_PMN.to(torch.bfloat16 if x_PMN.is_cuda else torch.float32)
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).to(x.dtype) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Parameters are [rows, columns] or stacks [E, rows, columns]; equal shapes are orthogonalised in one batch."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[tuple(sorted(p.shape[-2:]))].append(p)
            for params in by_shape.values():
                self._step_shape(params, group)

    def _step_shape(self, params: list[nn.Parameter], group: dict) -> None:
        grads = [p.grad for p in params]
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        # Nesterov: look one momentum step ahead.
        ahead = torch._foreach_lerp(grads, buffers, group["momentum"])
        tall = [p.shape[-2] > p.shape[-1] for p in params]
        wide = [(g.mT if t else g).reshape(-1, *sorted(p.shape[-2:])) for g, t, p in zip(ahead, tall, params)]
        update = orthogonalize(torch.cat(wide)).float().split([w.shape[0] for w in wide])
        update = [(u.mT if t else u).reshape(p.shape) for u, t, p in zip(update, tall, params)]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, update, alpha=-group["lr"] * UPDATE_RMS * max(params[0].shape[-2:]) ** 0.5)


def split_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters by role: `matrix` (inside layers), `indexer`, `other` (embedding, head, norms, router)."""
    groups = {"matrix": [], "indexer": [], "other": []}
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            role = "indexer"
        elif parameter.dim() >= 2 and ".layers." in name and not name.endswith(".gate.weight"):
            role = "matrix"
        else:
            role = "other"
        groups[role].append(parameter)
    return groups


def build(model: nn.Module, kind: str, lr: dict[str, float], weight_decay: float) -> list[torch.optim.Optimizer]:
    """Optimisers of `model`; each group keeps its peak rate as `peak` for the schedule. `kind`: "muon" or "adamw"."""
    if kind not in ("muon", "adamw"):
        raise ValueError(f'optimizer is {kind!r}, expected "muon" or "adamw"')
    roles = split_parameters(model)
    fused = next(model.parameters()).is_cuda
    adam_roles = ["other", "indexer"] + (["matrix"] if kind == "adamw" else [])
    optimizers = [
        torch.optim.AdamW(
            [
                {"params": roles[role], "lr": lr[role], "weight_decay": weight_decay if role == "matrix" else 0.0}
                for role in adam_roles
            ],
            betas=(0.9, 0.95),
            eps=1e-10,
            fused=fused,
        )
    ]
    if kind == "muon":
        optimizers.append(Muon(roles["matrix"], lr=lr["matrix"], weight_decay=weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
