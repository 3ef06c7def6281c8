"""The loss of captions: cross-entropy in fp32, summed over tokens and divided by the tokens of the GLOBAL
batch; in what is learnt (not in what is told), each token counts as its source's `loss_weight` says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from data.batch import Batch
from data.captions import IGNORED
from data.features import hide, log_mel
from trainer.distributed import World

if TYPE_CHECKING:
    from transformers import WhisperConfig


def token_losses(
    forward: Callable[..., Any], batch: Batch, config: WhisperConfig, dtype: torch.dtype
) -> torch.Tensor:
    """Losses of the tokens: (T,) float32, 0 where nothing is to be learnt. config: of the model; dtype: of
    its weights.

    A clip's losses do not depend on its neighbours, so neither does the sum over a global batch on
    micro-batches or ranks (to 1e-6 in fp32, 2e-4 in BF16).
    """
    window = 2 * config.max_source_positions
    mel = log_mel(batch.waveforms, batch.sound, batch.audio, config.num_mel_bins, window)
    mel = hide(mel, batch.sound, batch.audio, batch.time_masks, batch.band_masks).to(dtype)
    logits = forward(mel=mel, audio=batch.audio, tokens=batch.decoder_input_ids, text=batch.text)
    return torch.nn.functional.cross_entropy(
        logits.float(), batch.labels, ignore_index=IGNORED, reduction="none"
    )


def count_tokens(batch: Batch) -> int:
    """Tokens that are to be learnt."""
    return int((batch.labels != IGNORED).sum())


def token_weights(batch: Batch, loss_weights: torch.Tensor) -> torch.Tensor:
    """How much each token counts in what is learnt: (T,) float32, 0 where nothing is. loss_weights:
    (sources,) float32."""
    return loss_weights[batch.source[batch.text.owners]] * (batch.labels != IGNORED)


@dataclass
class SourceTotals:
    """Sums by source, each (sources,) float64, without loss weights. losses: of token losses; tokens: caption
    tokens."""

    losses: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def zeros(cls, sources: int, device: torch.device) -> SourceTotals:
        """Nothing yet."""
        losses = torch.zeros(sources, dtype=torch.float64, device=device)
        return cls(losses, torch.zeros_like(losses))

    def add(self, batch: Batch, losses: torch.Tensor) -> None:
        """Count a micro-batch. losses: (T,) of its tokens."""
        source = batch.source[batch.text.owners]
        self.losses.index_add_(0, source, losses.detach().double())
        self.tokens.index_add_(0, source, (batch.labels != IGNORED).double())

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
