"""The optimizer's parameter groups and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from configs.schema import Optim
from trainer.whisper import Whisper

LR_SHARE = "lr_share"
"""Key of an optimizer's group: the share of the learning rate that its parameters have."""


def adamw(model: Whisper, settings: Optim) -> torch.optim.AdamW:
    """AdamW over the trained parameters. Biases and norms (all that has one dimension) have no weight decay.

    A group has the parameters with one weight decay and one LR_SHARE.
    """
    shares = lr_shares(model, settings.layer_decay)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weight_decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((shares[name], weight_decay), []).append(parameter)
    # The fused one needs no compiler, as DeepSpeed's own would.
    return torch.optim.AdamW(
        [
            {"params": parameters, LR_SHARE: share, "weight_decay": weight_decay}
            for (share, weight_decay), parameters in groups.items()
        ],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def lr_shares(model: Whisper, layer_decay: float) -> dict[str, float]:
    """The share of the learning rate that each parameter has, by name.

    It is 1 in the last block of encoder and decoder and in what follows it, and in each other block
    `layer_decay` of that in the block above; so it is in what lies below all blocks (convolutions and
    embeddings; that of tokens is the output layer, too).
    """
    shares: dict[str, float] = {}
    for part, module in (("encoder", model.encoder), ("decoder", model.decoder)):
        blocks = len(module.layers)
        for name, _ in module.named_parameters():
            first, _, rest = name.partition(".")
            above = 0
            if first == "layers":
                above = blocks - 1 - int(rest.partition(".")[0])
            elif first != "layer_norm":
                above = blocks
            shares[f"model.{part}.{name}"] = layer_decay**above
    return shares


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Set the learning rate of an optimizer's groups, as `adamw` has made them."""
    for group in groups:
        group["lr"] = lr * group[LR_SHARE]


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
