"""The loss of captions: cross-entropy in fp32, summed over tokens and divided by the tokens of the GLOBAL
batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data.batch import Batch
from data.captions import IGNORED
from data.features import log_mel
from trainer.distributed import World


def token_losses(forward: Callable[..., Any], batch: Batch, mels: int, dtype: torch.dtype) -> torch.Tensor:
    """Sums of the caption tokens' losses, by sample: (B,) float32.

    The sum over a global batch divided by its tokens does not depend on micro-batches or ranks (to 1e-6 in
    fp32, 2e-4 in BF16).
    """
    features = log_mel(batch.waveforms, batch.lengths, batch.window, mels).to(dtype)
    logits = forward(
        input_features=features, decoder_input_ids=batch.decoder_input_ids, use_cache=False
    ).logits
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(batch.labels).sum(1)


def count_tokens(batch: Batch) -> torch.Tensor:
    """Caption tokens by sample: (B,) int64."""
    return (batch.labels != IGNORED).sum(1)


@dataclass
class SourceTotals:
    """Sums by source, each (sources,) float64. losses: of token losses; tokens: caption tokens."""

    losses: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def zeros(cls, sources: int, device: torch.device) -> SourceTotals:
        """Nothing yet."""
        losses = torch.zeros(sources, dtype=torch.float64, device=device)
        return cls(losses, torch.zeros_like(losses))

    def add(self, batch: Batch, losses: torch.Tensor) -> None:
        """Count a micro-batch. losses: (B,) sums of its token losses."""
        self.losses.index_add_(0, batch.source, losses.detach().double())
        self.tokens.index_add_(0, batch.source, count_tokens(batch).double())

    def over_ranks(self, world: World) -> SourceTotals:
        """The sums over all ranks, on the CPU. All ranks call it."""
        count = len(self.losses)
        sums = world.sum(torch.cat([self.losses, self.tokens]).tolist())
        summed = torch.tensor(sums, dtype=torch.float64)
        return SourceTotals(summed[:count], summed[count:])

    def means(self, names: Sequence[str], prefix: str) -> dict[str, float]:
        """Mean losses of a caption token: PREFIX of all sources, PREFIX/NAME of each that has tokens. Empty
        without tokens."""
        total = float(self.tokens.sum())
        if not total:
            return {}
        means = {prefix: float(self.losses.sum()) / total}
        for name, loss, tokens in zip(names, self.losses.tolist(), self.tokens.tolist(), strict=True):
            if tokens:
                means[f"{prefix}/{name}"] = loss / tokens
        return means
