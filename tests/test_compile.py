"""Compiled blocks are compiled once, not for each batch, and compute what they did before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from configs.schema import Model
from data.batch import Batch, Sample, collate
from data.captions import Tokens
from trainer import model as models
from trainer import whisper
from trainer.loss import token_losses


def batch(clips: int) -> Batch:
    random = np.random.default_rng(clips)
    samples = []
    for _ in range(clips):
        waveform = random.integers(-3000, 3000, int(random.integers(3000, 30000))).astype(np.int16)
        tokens = random.integers(9, 60, int(random.integers(4, 30))).tolist()
        frames = 2 * (len(waveform) // 320 + 1)
        samples.append(Sample(waveform, Tokens(tokens, tokens), "", 0, "", frames=frames))
    return collate(samples)


@torch.library.custom_op("earwitness_tests::packed_attention", mutates_args={})
def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    of_seen: torch.Tensor,
    longest: int,
    longest_seen: int,
    is_causal: bool,
) -> torch.Tensor:
    """A kernel that knows all clips at once, as GPUs have it."""
    own, seen = bounds.diff().tolist(), of_seen.diff().tolist()
    assert longest == max(own) and longest_seen == max(seen)
    return whisper._attend_each(q, k, v, Lengths(own), Lengths(seen), is_causal)


@packed_attention.register_fake
def _(q: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(q)


class Lengths:
    are_equal = False

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths


def at_once(q: Any, k: Any, v: Any, own: Any, of_seen: Any, is_causal: bool) -> torch.Tensor:
    return packed_attention(q, k, v, own.bounds, of_seen.bounds, own.longest, of_seen.longest, is_causal)


@pytest.mark.slow
@pytest.mark.parametrize("attend", ["each", "at_once"])
def test_batches_of_other_lengths_are_not_compiled_for_again(
    monkeypatch: pytest.MonkeyPatch, model: Path, attend: str
) -> None:
    """The loop over clips that CPUs take, and the one kernel of GPUs, which is told the longest clip."""
    torch._dynamo.reset()
    if attend == "at_once":
        monkeypatch.setattr(whisper, "attend", at_once)
    compiled, plain = (
        models.load(Model(name_or_path=str(model), compile=compile), seed=1) for compile in (True, False)
    )
    before = counters["stats"]["unique_graphs"]
    graphs = []
    with torch.no_grad():
        for clips in (2, 3, 5, 1, 7, 4):
            losses, expected = (
                token_losses(each.model, batch(clips), each.config, torch.float32)
                for each in (compiled, plain)
            )
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
            graphs.append(counters["stats"]["unique_graphs"])
    assert before < graphs[0] == graphs[-1], graphs
