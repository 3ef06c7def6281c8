"""An export is tried as its users will: read through the door of all models, loaded by transformers,
compared, and asked for a caption."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, WhisperTokenizer, pipeline

from configs.errors import CheckpointError, ConfigError
from data.captions import prefix_tokens
from data.decode import SAMPLE_RATE
from tools.hub_files import PIPELINE
from trainer.captioning import Generator, Heard
from trainer.examine import Pretrained, examine
from trainer.weights import Weights
from trainer.whisper import from_transformers

SECONDS = 3
TIE = 1e-2
"""Logits that are no further apart are alike: log-mel spectrograms of two programs differ by rounding."""


def check_export(
    base: Pretrained, weights: Weights, generation: dict[str, Any], folder: Path, dtype: torch.dtype
) -> str:
    """Load the export, compare every tensor, and caption a sound with it by transformers alone, and as the
    run does; returns the caption. base: the run's; generation: what it generates with. Raises
    CheckpointError."""
    _examine(weights, folder, dtype)
    with _telling(base):
        stranger: Any = pipeline(PIPELINE, model=str(folder), device="cpu")
    _compare(weights, stranger.model, folder, dtype)
    stranger.model.float()  # for the other dtypes, many CPUs have no arithmetic
    sound = _sound(min(SECONDS, stranger.feature_extractor.chunk_length))
    heard = {"raw": sound.numpy() / 32768, "sampling_rate": SAMPLE_RATE}
    with _telling(base):
        caption = str(stranger(heard)["text"]).strip()
    tokens = _run_tokens(stranger.model, generation, sound)
    tokenizer = WhisperTokenizer.from_pretrained(base.folder)
    expected = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    prefix = prefix_tokens(base.tokenizer, generation)
    # The run may stop earlier, if its base has a lower limit.
    if not caption.startswith(expected) and not _is_tie(stranger, sound, prefix, tokens):
        raise _useless(base, f"transformers says {caption!r} of a sound where the run says {expected!r}")
    return caption


def _examine(weights: Weights, folder: Path, dtype: torch.dtype) -> None:
    """Read the export as whatever takes models here will. Raises CheckpointError."""
    try:
        examine(str(folder), "the export", needs_weights=True)
    except ConfigError as error:
        words = str(error).replace(f"{folder}/", "")
        beyond = " fp16 holds nothing beyond 65,504: `--dtype bf16` does." if dtype == torch.float16 else ""
        raise CheckpointError(f"{weights.reader.folder}: {words}.{beyond} Nothing is left of it") from error


@contextlib.contextmanager
def _telling(base: Pretrained) -> Iterator[None]:
    """Let errors of transformers, which has a class for each way to fail, say what the export is for."""
    try:
        yield
    except Exception as error:
        raise _useless(base, f"transformers {transformers.__version__} fails: {error}") from error


def _useless(base: Pretrained, why: str) -> CheckpointError:
    return CheckpointError(
        f"the export would be of no use to others: {why}. Nothing is left of it. What it was made from"
        f" besides the weights is in {base.folder}: compare generation_config.json and tokenizer.json there"
        " with those of the Whisper that the run began with"
    )


def _compare(weights: Weights, model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Compare every tensor. Raises CheckpointError."""
    loaded = dict(model.named_parameters()) | dict(model.named_buffers())
    different = sorted(loaded.keys() ^ weights.shapes.keys()) or [
        name for name in weights.shapes if not torch.equal(loaded[name], weights[name].to(dtype))
    ]
    if different:
        raise CheckpointError(
            f"{folder}: what from_pretrained loads is not what the checkpoint holds:"
            f" {', '.join(different[:3])} ({len(different)} of {len(weights.shapes)} tensors)"
        )


def _sound(seconds: float) -> torch.Tensor:
    """Beeps in noise, (n,) int16 at 16 kHz; the same each time."""
    time = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    beeps = torch.sin(2 * torch.pi * 700 * time) * (time % 1 < 0.5)
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    return ((0.3 * beeps + 0.01 * noise) * 32767).to(torch.int16)


def _run_tokens(model: Any, generation: dict[str, Any], sound: torch.Tensor) -> torch.Tensor:
    """Tokens of the caption that the run gives a sound, at the whole window, (n,), without their prefix."""
    generator = Generator(from_transformers(model), GenerationConfig.from_dict(generation))
    (tokens,) = generator([Heard(sound, 2 * model.config.max_source_positions, [])])
    return tokens


@torch.no_grad()
def _is_tie(stranger: Any, sound: torch.Tensor, prefix: list[int], ours: torch.Tensor) -> bool:
    """Whether transformers' tokens leave those of the run where both go on with an equal right."""
    model = stranger.model
    heard = stranger.feature_extractor(
        sound.numpy() / 32768, sampling_rate=SAMPLE_RATE, return_tensors="pt"
    ).input_features
    theirs = model.generate(heard)[0]
    shorter = min(len(ours), len(theirs))
    apart = (ours[:shorter] != theirs[:shorter]).nonzero()
    if not len(apart):
        return False
    place = int(apart[0])
    before = torch.tensor([[*prefix, *ours[:place].tolist()]])
    logits = model(input_features=heard, decoder_input_ids=before).logits[0, -1]
    return bool((logits[ours[place]] - logits[theirs[place]]).abs() < TIE)
