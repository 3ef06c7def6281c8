"""The benchmark of augmentation: what each part of it costs of a core for a clip of 10 s."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import soundfile
import torch
import typer

from configs.schema import Augment
from data.augment import Augmentation, Waveform, mixed
from data.batch import Sample, collate
from data.captions import Tokens
from data.decode import SAMPLE_RATE, decode
from data.features import hide, log_mel
from tools.bench.report import Figures, describe, report, say, summary

SECONDS = 10
MELS, WINDOW = 128, 3000
CLIPS = 50
PARTS: dict[str, dict[str, object]] = {
    "gain_db": {"gain_db": 6},
    "noise_snr_db": {"noise_snr_db": (10, 40), "noise_share": 1.0},
    "speed": {"speed": (0.9, 1.1)},
}
"""Settings that change a waveform, by what is measured."""


def bench_augment(
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each, in turn.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure what each part of `data.augment` costs of a core, for clips of 10 s."""
    torch.set_num_threads(1)
    by_round: list[Figures] = []
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        by_round.append(_measure())
    conditions = describe("numpy", "torch", "soxr") | {"clips": CLIPS, "seconds": SECONDS}
    report(conditions, {"augment": {"milliseconds a clip": summary(by_round)}}, {}, as_json=as_json)


def _measure() -> Figures:
    random = np.random.default_rng(0)
    clips = [random.normal(0, 2000, SECONDS * SAMPLE_RATE).astype(np.int16) for _ in range(2)]
    figures = {
        name: _milliseconds(_changing(Augment.model_validate(settings), clips[0]))
        for name, settings in PARTS.items()
    }
    masks = _augmentation(Augment.model_validate({"spec_augment": {"time_masks": 2, "band_masks": 2}})).masks
    sample = Sample(clips[0], Tokens([0], [0]), "", 0, "", 100 * SECONDS, masks(0, 0))
    batch = collate([sample])
    mel = log_mel(batch.waveforms, batch.sound, batch.audio, MELS, WINDOW)
    file = io.BytesIO()
    soundfile.write(file, clips[1], SAMPLE_RATE, format="FLAC")
    flac = file.getvalue()
    return figures | {
        "spec_augment": _milliseconds(
            lambda number: (
                masks(number, 0),
                hide(mel, batch.sound, batch.audio, batch.time_masks, batch.band_masks),
            )
        ),
        "mix": _milliseconds(lambda number: mixed(*clips)),
        "mix_with_decoding_of_the_partner": _milliseconds(
            lambda number: mixed(clips[0], decode(flac, "flac"))
        ),
        "for_comparison_decoding_a_clip": _milliseconds(lambda number: decode(flac, "flac")),
        "for_comparison_log_mel": _milliseconds(
            lambda number: log_mel(batch.waveforms, batch.sound, batch.audio, MELS, WINDOW)
        ),
    }


def _augmentation(settings: Augment) -> Augmentation:
    return Augmentation(settings, 0, np.zeros(CLIPS, np.int64), 30 * SAMPLE_RATE)


def _changing(settings: Augment, clip: Waveform) -> Callable[[int], object]:
    augmentation = _augmentation(settings)
    return lambda number: augmentation.waveform(clip, number, 0)


def _milliseconds(work: Callable[[int], object]) -> float:
    """CPU time of some work for a clip, given its number."""
    work(0)
    began = time.process_time()
    for number in range(CLIPS):
        work(number)
    return 1000 * (time.process_time() - began) / CLIPS
