"""The optimizer's parameter groups and the course of the learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch

from configs.schema import Optim


def adamw(model: torch.nn.Module, settings: Optim) -> torch.optim.AdamW:
    """AdamW over the trained parameters. Biases and norms (all that has one dimension) have no weight
    decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained, "weight_decay": 0.0}]
    if settings.weight_decay:
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
    # The fused one needs no compiler, as DeepSpeed's own would.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def learning_rate(settings: Optim, step: int, total: int) -> float:
    """Learning rate of step 0 ... total - 1: a pure function, so that resuming needs no state."""
    warmup = math.ceil(total * settings.warmup_fraction)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    factor = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left)))}[
        settings.schedule
    ]
    return settings.lr * factor
