"""Clips that are changed by chance are changed alike on any ranks and after a resume, and stay what their
captions say."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, WhisperConfig, WhisperProcessor

from configs.errors import ConfigError
from configs.load import validate
from configs.schema import Augment
from data.augment import NEIGHBOURS, Augmentation, joined, mixed
from data.batch import Batch, Masks, Sample, collate
from data.captions import CaptionEncoder, Tokens, prefix_tokens
from data.features import hide, log_mel
from data.loader import Loader, Step
from data.order import EMPTY
from tests import shards as small
from tests.evaluators import open_loaders
from tests.making import config_values
from trainer.distributed import World
from trainer.flops import step_flops
from trainer.loaders import CAPTION_TOKENS, Loaders

SECOND = 16_000
SHARD = np.repeat([0, 1, 2, 3], [1, 5, 300, 700])
ROWS = np.arange(len(SHARD))
ALL = {
    "gain_db": 6,
    "noise_snr_db": [5, 20],
    "speed": [0.8, 1.25],
    "mix": 0.5,
    "spec_augment": {"time_masks": 2, "band_masks": 1},
}


def augmentation(seed: int = 0, longest: int = 30 * SECOND, **settings: object) -> Augmentation:
    return Augmentation(Augment.model_validate(settings), seed, SHARD, longest)


def tone(hertz: float, seconds: float = 1.0, amplitude: float = 8000.0) -> np.ndarray:
    time = np.arange(round(seconds * SECOND)) / SECOND
    return (amplitude * np.sin(2 * np.pi * hertz * time)).astype(np.int16)


def loudness(audio: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))


def test_what_a_clip_gets_depends_on_seed_epoch_and_sample_alone() -> None:
    clip = tone(440)
    known = augmentation(**ALL)
    for row in (1, 70, 900):
        again = augmentation(**ALL)
        again.waveform(tone(50), row + 1, 3)  # what was asked for before changes nothing
        expected = known.waveform(clip, row, 3)
        assert np.array_equal(again.waveform(clip, row, 3), expected)
        assert np.array_equal(again.masks(row, 3).time, known.masks(row, 3).time)
        for other in (
            known.waveform(clip, row, 4),
            known.waveform(clip, row + 1, 3),
            augmentation(1, **ALL).waveform(clip, row, 3),
        ):
            assert not np.array_equal(other, expected)
    together = known.partners(ROWS, 3)
    assert all(known.partners(ROWS[row : row + 1], 3)[0] == together[row] for row in ROWS[::97])


def test_what_a_clip_gets_is_the_same_under_every_version_of_numpy() -> None:
    """In numbers: a run that goes on with another version must go on alike."""
    known = augmentation(seed=7, **ALL)
    assert known.partners(ROWS[:16], 1).tolist() == [
        -1,
        -1,
        -1,
        1,
        2,
        4,
        -1,
        8,
        -1,
        11,
        18,
        13,
        16,
        -1,
        -1,
        -1,
    ]
    assert len(known.waveform(tone(440), 3, 1)) == 17_919
    assert known.lengths(lambda rows: np.full(len(rows), SECOND), ROWS[3:4], 1).tolist() == [17_919]
    assert known.masks(3, 1).bands.tolist() == [pytest.approx([0.03463876, 0.67248887], abs=1e-7)]


def test_what_exceeds_full_scale_is_clipped_and_does_not_wrap_around() -> None:
    loud = np.array([32767, -32768, 20000, -20000, 100], np.int16)
    louder = [augmentation(gain_db=20).waveform(loud, row, 0) for row in range(40)]
    assert any((clip[:2] == [32767, -32768]).all() and abs(int(clip[4])) > 300 for clip in louder)
    for clip in louder:
        assert clip.dtype == np.int16 and (np.sign(clip) == np.sign(loud)).all()
    both = mixed(loud, np.array([32767, -32768, 32767, -32768, 0], np.int16))
    assert (np.sign(both) == np.sign(loud)).all()


def test_gains_are_even_in_decibels_between_their_limits() -> None:
    gains = [
        20
        * np.log10(loudness(augmentation(gain_db=6).waveform(tone(440, 0.1), row, 0)) / loudness(tone(440)))
        for row in range(400)
    ]
    assert min(gains) == pytest.approx(-6, abs=0.2) and max(gains) == pytest.approx(6, abs=0.2)
    assert np.mean(gains) == pytest.approx(0, abs=0.5) and np.std(gains) == pytest.approx(3.46, abs=0.3)


def test_noise_has_the_ratio_and_the_share_that_were_asked_for() -> None:
    clip = tone(440)
    noisy = augmentation(noise_snr_db=[10, 10], noise_share=0.25)
    noises = [noisy.waveform(clip, row, 0).astype(int) - clip for row in range(200)]
    there = [noise for noise in noises if noise.any()]
    assert len(there) / len(noises) == pytest.approx(0.25, abs=0.08)
    for noise in there:
        assert 20 * np.log10(loudness(clip) / loudness(noise)) == pytest.approx(10, abs=0.1)
    assert not augmentation(noise_snr_db=[0, 0], noise_share=1.0).waveform(np.zeros(99, np.int16), 0, 0).any()


def test_speed_changes_length_and_pitch_together_and_exceeds_no_limit() -> None:
    faster = augmentation(speed=[1.25, 1.25]).waveform(tone(1000), 5, 0)
    assert len(faster) == 12_800
    assert np.abs(np.fft.rfft(faster)).argmax() * SECOND / len(faster) == pytest.approx(1250, abs=2)
    slower = augmentation(speed=[0.5, 0.5], longest=SECOND + 100)
    assert len(slower.waveform(tone(1000), 5, 0)) == SECOND + 100
    assert len(slower.waveform(tone(1000, 0.25), 5, 0)) == SECOND / 2
    assert len(augmentation(speed=[2, 2]).waveform(np.ones(1, np.int16), 5, 0)) == 1


def test_two_clips_are_mixed_equally_loud_unless_one_cannot_be_heard() -> None:
    short, long = tone(440, 0.5, 12_000), tone(2000, 1.0, 3000)
    both = mixed(short, long)
    assert len(both) == SECOND
    spectrum = np.abs(np.fft.rfft(both[: SECOND // 2]))
    assert spectrum[220] == pytest.approx(spectrum[1000], rel=0.1)
    assert loudness(both[SECOND // 2 :]) == pytest.approx(loudness(short) / 2, rel=0.01)
    assert mixed(short, np.zeros(50, np.int16)) is None and mixed(tone(440, 1, 20), short) is None


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("A dog barks.", "A bell rings.", "A dog barks and a bell rings."),
        ("A dog barks", "Birds sing", "A dog barks and birds sing"),
        ("Rain. Thunder.", "The sea.", "Rain. Thunder and the sea."),
        ("It fades... ", "TV noise.", "It fades and TV noise."),
        ("A bell!", "McDonald's jingle.", "A bell! and McDonald's jingle."),
        ("A bell.", "I hear rain.", "A bell and I hear rain."),
        ("A bell.", "John Smith speaks.", "A bell and John Smith speaks."),
        ("A bell.", '"Stop" is shouted.', 'A bell and "Stop" is shouted.'),
        ("A bell.", "4 knocks.", "A bell and 4 knocks."),
    ],
)
def test_captions_of_mixed_clips_are_joined_to_one(first: str, second: str, expected: str) -> None:
    assert joined(first, second) == expected


def test_a_partner_is_another_clip_of_the_shard_and_a_near_one() -> None:
    partners = augmentation(mix=1.0).partners(ROWS, 2)
    assert partners[0] == EMPTY, "alone in its shard"
    assert (SHARD[partners[1:]] == SHARD[1:]).all() and (partners != ROWS).all()
    ahead = (partners - ROWS)[1:]
    assert set(ahead[ahead > 0]) == set(range(1, NEIGHBOURS + 1)), "but at the end of a shard"
    half = augmentation(mix=0.5)
    assert np.mean(half.partners(ROWS, 2) != EMPTY) == pytest.approx(0.5, abs=0.05)
    assert (half.partners(ROWS, 2) != half.partners(ROWS, 3)).any()


def masked_batch(masks: list[Masks], frames: list[int]) -> Batch:
    random = np.random.default_rng(0)
    return collate(
        [
            Sample(
                random.integers(-9000, 9000, 16_000 * (1 + number)).astype(np.int16),
                Tokens([1], [1]),
                "",
                0,
                str(number),
                length,
                mask,
            )
            for number, (mask, length) in enumerate(zip(masks, frames, strict=True))
        ]
    )


def hidden(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    mel = log_mel(batch.waveforms, batch.sound, batch.audio, 80, 3000)
    return mel, hide(mel, batch.sound, batch.audio, batch.time_masks, batch.band_masks)


def test_masks_hide_stretches_and_bands_of_their_own_clip_with_its_mean() -> None:
    drawn = augmentation(spec_augment={"time_masks": 2, "time_share": 0.2, "band_masks": 1})
    masks = [drawn.masks(row, 0) for row in range(3)]
    batch = masked_batch(masks, [100, 3000, 300])  # the second one is padded
    mel, masked = hidden(batch)
    for number, (whole, part) in enumerate(
        zip(mel.split([100, 3000, 300], 1), masked.split([100, 3000, 300], 1), strict=True)
    ):
        sound = 100 * (1 + number)
        is_hidden = whole != part
        assert is_hidden[:, :sound].any() and not is_hidden[:, sound:].any(), "silence is no clip"
        assert torch.allclose(part[is_hidden], whole[:, :sound].mean())
        times, bands = is_hidden[:, :sound].all(0), is_hidden[:, :sound].all(1)
        assert times.sum() <= 2 * 0.2 * sound and bands.sum() <= 0.15 * 80
        outside = is_hidden[:, :sound][~bands][:, ~times]
        assert not outside.any()


def test_masks_do_not_depend_on_neighbours() -> None:
    drawn = augmentation(spec_augment={"time_masks": 3, "band_masks": 3})
    masks = [drawn.masks(row, 0) for row in range(3)]
    together = hidden(masked_batch(masks, [100, 200, 300]))[1].split([100, 200, 300], 1)
    batch = masked_batch(masks, [100, 200, 300])
    waveforms = batch.waveforms.split(list(batch.sound.lengths))
    for number in range(3):
        clip = Sample(
            waveforms[number].numpy(), Tokens([1], [1]), "", 0, "", 100 * (number + 1), masks[number]
        )
        assert torch.allclose(hidden(collate([clip]))[1], together[number], atol=1e-6)


def test_without_masks_the_log_mel_is_untouched() -> None:
    batch = masked_batch([augmentation(gain_db=3).masks(0, 0)] * 2, [100, 200])
    mel, masked = hidden(batch)
    assert masked is mel


Make = Callable[..., Loaders]


@pytest.fixture
def made(model: Path, shards: str, tmp_path: Path) -> Make:
    """The loaders of a run on one of some ranks; keyword arguments are settings of `data`."""
    tokenizer = WhisperProcessor.from_pretrained(model).tokenizer.backend_tokenizer
    prefix = prefix_tokens(tokenizer, GenerationConfig.from_pretrained(model).to_dict())

    def made(*, ranks: int = 1, rank: int = 0, of: str = shards, **data: Any) -> Loaders:
        values = config_values("run", tmp_path, model, of, batch={"global_size": 8})
        values["data"] |= {"shuffle_window": 5, **data}
        config = validate(values, "test")
        world = World(rank, ranks, torch.device("cpu"))
        encoder = CaptionEncoder(tokenizer, prefix, positions=64, long_caption="truncate")
        return open_loaders(config, world, WhisperConfig.from_pretrained(model), encoder, full=True)

    return made


def taken(loader: Loader) -> list[Step]:
    steps = list(loader)
    loader.close()
    return steps


def content(samples: list[Sample]) -> list[tuple[object, ...]]:
    """Of samples in the order of their keys: ranks have them in another one."""
    return [
        (
            *(s.key, s.caption, s.frames, *s.tokens.labels),
            *(array.tobytes() for array in (s.waveform, s.masks.time, s.masks.bands)),
        )
        for s in sorted(samples, key=lambda sample: sample.key)
    ]


def test_ranks_and_resumes_change_nothing_of_what_is_made_of_a_clip(made: Make) -> None:
    """Balanced ones, too, which read some clips alone, and those that read all so."""
    steps = range(8)
    made = functools.partial(made, augment=ALL, shuffle_window=50)
    whole = [content(step.samples) for step in taken(made().training(steps))]
    captions = [sample[1] for step in whole for sample in step]
    assert 0.3 < np.mean([" and " in str(caption) for caption in captions]) < 0.7
    parts = [taken(made(ranks=3, rank=rank).training(steps)) for rank in range(3)]
    together = [
        content([s for step in of_ranks for s in step.samples]) for of_ranks in zip(*parts, strict=True)
    ]
    assert together == whole
    resumed = taken(made(read_ahead_mb=1).training(range(3, 8)))
    assert [content(step.samples) for step in resumed] == whole[3:]


def test_what_is_off_leaves_clips_as_they_are_and_validation_stays_so(made: Make) -> None:
    plain = made()
    before = [content(step.samples) for step in taken(plain.training(range(4)))]
    off = {"augment": {"gain_db": 0, "mix": 0, "noise_share": 0.9}, "style_drop": 0}
    assert [content(step.samples) for step in taken(made(**off).training(range(4)))] == before
    changed = made(augment=ALL, style_drop=1.0)
    assert [content(step.samples) for step in taken(changed.training(range(4)))] != before
    validations = [taken(loaders.validation([0, 1, 2, 3], per_rank=4)) for loaders in (plain, changed)]
    assert content(validations[0][0].samples) == content(validations[1][0].samples)


def test_the_work_that_ranks_are_balanced_by_is_that_of_changed_clips(made: Make) -> None:
    loaders = made(ranks=2, augment={"mix": 0.5, "speed": [0.8, 1.25]}, full_share=0.0)
    loader = loaders.training(range(6))
    assert loader.balance
    steps = taken(loader)
    rows = {loaders.dataset.training.identity(row): row for row in range(len(loaders.dataset.training))}
    assert loaders.order.locate(5)[0] == 0
    for sample in (sample for step in steps for sample in step.samples):
        work = loader.balance.work(np.array([rows[sample.key]]), 0)[0]
        assert 2 * -(-len(sample.waveform) // 320) == sample.frames
        expected = step_flops(loaders.model, sample.frames // 2, CAPTION_TOKENS)
        assert work == pytest.approx(expected, rel=0.05), sample.key


def test_a_partner_that_cannot_be_used_or_says_too_much_leaves_the_clip_as_it_is(
    made: Make, tmp_path: Path
) -> None:
    """It rejects nobody else's sample: a broken neighbour, and one whose caption would not fit."""
    broken = [("b.wav", small.sound(1)[:44] + b"\1" * 3), ("b.json", small.words("A broken clip."))]
    long = [("c.wav", small.sound(2)), ("c.json", small.words("A very long tale. " * 12))]
    for name, other in (("broken", broken), ("long", long)):
        path = small.shard(tmp_path / name / "a.tar", [*small.clip("a", 0), *other])
        loaders = made(
            of=str(path),
            augment={"mix": 1.0},
            long_caption="skip",
            sources=[{"name": "sounds", "shards": [str(path)]}],
            max_bad_fraction=1.0,
        )
        steps = taken(loaders.training(range(1)))
        (sample,) = [s for step in steps for s in step.samples if s.key.endswith("/a")]
        assert sample.caption == "Clip 0."


def test_ranges_that_cannot_be_meant_are_refused() -> None:
    for settings, words in (
        ({"speed": [1.1, 0.9]}, "[low, high]"),
        ({"speed": [0.1, 1]}, "greater than or equal to 0.5"),
        ({"noise_snr_db": [10, 300]}, "less than or equal to 100"),
    ):
        values = config_values("run", Path("x"), Path("x"), "*.tar")
        values["data"] |= {"augment": settings}
        with pytest.raises(ConfigError) as caught:
            validate(values, "test")
        assert words in str(caught.value) and "data.augment." in str(caught.value)
