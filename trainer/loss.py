"""The loss of captions: cross-entropy in fp32, summed over tokens and divided by the tokens of the GLOBAL
batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from data.batch import Batch
from data.captions import IGNORED
from data.features import log_mel


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
