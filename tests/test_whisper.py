"""Our Whisper is transformers' one, and what it says of a clip depends on that clip alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration

from data.batch import Sample, collate
from data.captions import IGNORED, Tokens
from data.decode import decode
from tests import stock
from trainer.loss import token_losses, token_weights
from trainer.whisper import Whisper, as_transformers, from_transformers

WINDOW = 200
"""Mel frames of the small model's window."""
SECONDS = (0.9, 0.02, 1.317, 0.5, 2.0)


def noise(seconds: float, seed: int, whole: int = 0) -> Sample:
    """A clip of noise with a caption of a few tokens. whole: mel frames, if it is padded to so many."""
    generator = np.random.default_rng(seed)
    waveform = generator.normal(0, 3000, round(seconds * 16_000)).astype(np.int16)
    ids = generator.integers(9, 99, 3 + seed).tolist()
    tokens = Tokens(ids, [IGNORED, *ids[2:], 8])
    frames = whole or 2 * -(-len(waveform) // 320)
    return Sample(waveform, tokens, "", source=0, key=f"noise/{seed}", frames=frames)


@pytest.fixture
def theirs(model: Path) -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    network = WhisperForConditionalGeneration(
        WhisperForConditionalGeneration.config_class.from_pretrained(model)
    )
    return network.train()


@pytest.fixture
def ours(theirs: WhisperForConditionalGeneration) -> Whisper:
    """With a copy of the same weights."""
    copied = WhisperForConditionalGeneration(theirs.config)
    copied.load_state_dict(theirs.state_dict())
    return from_transformers(copied).train()


def of_each(whisper: Whisper, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Losses of the tokens of each clip, in one pack, by key."""
    batch = collate(samples)
    losses = token_losses(whisper, batch, whisper.config, torch.float32)
    return dict(zip(batch.keys, losses.split(list(batch.text.lengths)), strict=True))


def of_stock(network: WhisperForConditionalGeneration, sample: Sample) -> torch.Tensor:
    logits = stock.logits(network, sample, WINDOW)
    labels = torch.tensor(sample.tokens.labels)
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")


def assert_same_gradients(whisper: torch.nn.Module, network: torch.nn.Module) -> None:
    expected = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in whisper.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) > 30
    size = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-6 * size, name


@pytest.mark.parametrize("whole", [WINDOW, 0], ids=["full windows", "own lengths"])
def test_losses_and_gradients_are_those_of_transformers(theirs, ours, whole: int) -> None:
    """At own lengths: of one whose window is as long as the clip."""
    samples = [noise(seconds, seed, whole) for seed, seconds in enumerate(SECONDS)]
    losses = of_each(ours, samples)
    torch.cat(list(losses.values())).sum().backward()
    for sample in samples:
        expected = of_stock(theirs, sample)
        expected.sum().backward()
        assert torch.allclose(losses[sample.key], expected, rtol=2e-6, atol=1e-6)
    assert_same_gradients(ours, theirs)


def test_a_clip_alone_or_among_others_first_or_last_has_the_same_loss(ours) -> None:
    samples = [noise(seconds, seed) for seed, seconds in enumerate(SECONDS)]
    together, turned = of_each(ours, samples), of_each(ours, samples[::-1])
    for sample in samples:
        alone = of_each(ours, [sample])[sample.key].sum().item()
        assert together[sample.key].sum().item() == pytest.approx(alone, rel=1e-6)
        assert turned[sample.key].sum().item() == pytest.approx(alone, rel=1e-6)


def test_tokens_count_as_the_weights_of_their_sources_say_in_any_micro_batches(ours) -> None:
    """And two of a weight of 2 as two of 1."""
    clips = [noise(seconds, seed) for seed, seconds in enumerate(SECONDS)]
    clips = [replace(clip, source=number % 2) for number, clip in enumerate(clips)]

    def gradient(weights: list[float], *groups: list[Sample]) -> torch.Tensor:
        ours.zero_grad()
        by_source = torch.tensor(weights)
        batches = [collate(group) for group in groups]
        total = sum(token_weights(batch, by_source).sum() for batch in batches)
        for batch in batches:
            losses = token_losses(ours, batch, ours.config, torch.float32)
            ((losses * token_weights(batch, by_source)).sum() / total).backward()
        return torch.cat([p.grad.flatten() for p in ours.parameters() if p.grad is not None])

    even, weighted = gradient([1, 1], clips), gradient([1, 3], clips)
    size = even.norm()
    assert (gradient([2, 2], clips[:2], clips[2:]) - even).norm() < 1e-6 * size
    assert (gradient([2, 6], clips[3:], clips[:3]) - weighted).norm() < 1e-6 * size
    learnt = [sum(label != IGNORED for clip in clips[n::2] for label in clip.tokens.labels) for n in range(2)]
    alone = [gradient([1, 1], clips[n::2]) for n in range(2)]
    expected = (learnt[0] * alone[0] + 3 * learnt[1] * alone[1]) / (learnt[0] + 3 * learnt[1])
    assert (weighted - expected).norm() < 1e-5 * size and (weighted - even).norm() > 0.01 * size


def test_a_pack_holds_no_padding_and_an_empty_one_has_no_gradient(ours) -> None:
    samples = [noise(seconds, seed) for seed, seconds in enumerate(SECONDS)]
    batch = collate(samples)
    assert batch.audio.total * 0.02 - sum(SECONDS) < 0.02 * len(SECONDS)
    assert len(batch.decoder_input_ids) == sum(len(sample.tokens.input_ids) for sample in samples)
    token_losses(ours, collate([]), ours.config, torch.float32).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())


def test_recomputed_activations_change_nothing(theirs, ours) -> None:
    samples = [noise(seconds, seed) for seed, seconds in enumerate(SECONDS)]
    for whisper in (ours, from_transformers(theirs)):
        whisper.encoder.checkpointing = whisper.decoder.checkpointing = whisper is ours
        torch.cat(list(of_each(whisper, samples).values())).sum().backward()
    assert_same_gradients(ours, theirs)


def test_transformers_generates_with_the_same_tensors_and_what_is_frozen_stays_so(theirs, ours) -> None:
    ours.encoder.conv1.requires_grad_(False)
    shared = as_transformers(ours, theirs.generation_config)
    parameters = dict(ours.named_parameters())
    assert all(parameter is parameters[name] for name, parameter in shared.named_parameters())
    assert shared.proj_out.weight is ours.decoder.embed_tokens.weight is ours.proj_out.weight
    assert not ours.encoder.conv1.weight.requires_grad and ours.encoder.conv2.weight.requires_grad
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_full_windows_of_a_real_whisper(pretrained: Path, real_clips: Path) -> None:
    network = WhisperForConditionalGeneration.from_pretrained(pretrained / "tiny.en", dtype=torch.float32)
    whisper = from_transformers(network)
    files = [real_clips / "speech" / name for name in ("vm-goodbye.wav", "agent-alreadyon.wav")]
    waveforms = [decode(file.read_bytes(), "wav") for file in files]
    ids = [50257, 50362, *range(100, 112)]
    samples = [
        Sample(waveform, Tokens(ids, [*ids[1:], 50256]), "", 0, file.name, 3000)
        for waveform, file in zip(waveforms, files, strict=True)
    ]
    with torch.no_grad():
        losses = of_each(whisper, samples)
        for sample in samples:
            logits = stock.logits(network, sample, 3000)
            expected = torch.nn.functional.cross_entropy(
                logits, torch.tensor(sample.tokens.labels), reduction="none"
            )
            found = losses[sample.key]
            assert found.mean().item() == pytest.approx(expected.mean().item(), rel=1e-6)
            assert (found - expected).abs().max() < 3e-5
