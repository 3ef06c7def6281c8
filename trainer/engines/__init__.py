"""Engines spread a model over the ranks. What the trainer asks of one, and the pieces of state that all of
them exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from trainer.whisper import Whisper

KINDS = ("master", "exp_avg", "exp_avg_sq")
"""What a checkpoint holds of each parameter: the fp32 weights and AdamW's two moments."""


@dataclass(frozen=True)
class Fragment:
    """Elements [start, end) of a flattened parameter that this rank holds: 1-D float32 tensors by kind."""

    name: str
    start: int
    end: int
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Update:
    """What an optimizer step did. grad_norm: before clipping; applied: false if the gradient was not
    finite."""

    grad_norm: float
    applied: bool


Read = Callable[[str, str, int, int], torch.Tensor]
"""read(name, kind, start, end) -> (end - start,) float32 of a parameter's state."""


class Engine(Protocol):
    """Gradients are the SUM over ranks and micro-batches of the globally normalised loss."""

    dtype: torch.dtype
    """Of the weights that compute."""

    def __call__(self, **inputs: Any) -> torch.Tensor:
        """Forward pass of the model, as `Whisper.forward` takes its inputs: logits (T, vocabulary)."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradient; `last` marks the last one of a step."""

    def step(self, lr: float) -> Update:
        """Clip, update the weights and forget the gradient."""

    def forget(self) -> None:
        """Forget the gradient of micro-batches whose `last` one was marked, as if they had not been."""

    def fragments(self) -> list[Fragment]:
        """This rank's share of the state: views, not copies. The same stretches every time."""

    def updates(self) -> int:
        """AdamW's own counter of updates."""

    def load(self, read: Read, updates: int | None) -> None:
        """Set this rank's share of the state; `publish` then lets all ranks compute with it. `updates` None:
        the weights, with a fresh optimizer."""

    def publish(self) -> None:
        """Make the weights that compute from what every rank has loaded. Every rank must call it at the same
        point."""

    def evaluation_module(self) -> Whisper:
        """The whole model as it is now, for evaluation and generation. Every rank must call it at the same
        point."""


def global_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Norm of a gradient whose pieces all ranks hold, () float64 on the device; not finite if it is not.

    gradients: this rank's, at least one. In float64: by float32 that of 20 million elements is off by a
    thousandth on a CPU.
    """
    squares = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square().sum()
    dist.all_reduce(squares)
    return squares.sqrt()
