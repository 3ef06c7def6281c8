"""How much of a window the encoder takes of a clip, and which samples are padded to the whole one."""

from __future__ import annotations

import numpy as np
import pytest

from data.batch import Sample, Size
from data.captions import Tokens
from data.windows import Windows

ROWS = np.arange(20_000)
LENGTHS = 16_000 * (1 + ROWS % 28)


def whole(windows: Windows, epoch: int) -> np.ndarray:
    return windows.frames(LENGTHS, ROWS, epoch) == windows.whole


def test_a_clip_takes_its_own_frames_in_pairs_and_no_more_than_the_window() -> None:
    windows = Windows(3000, share=0.0, seed=0)
    lengths = [1, 319, 320, 321, 16_000, 16_001, 30 * 16_000, 31 * 16_000]
    assert windows.frames(lengths, range(8), 0).tolist() == [2, 2, 2, 4, 100, 102, 3000, 3000]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.5, 1.0])
def test_the_share_that_is_padded_is_as_asked_for_and_others_each_epoch(share: float) -> None:
    windows = Windows(3000, share, seed=3)
    epochs = [whole(windows, epoch) for epoch in range(3)]
    for padded in epochs:
        assert padded.mean() == pytest.approx(share, abs=0.01)
        assert padded.all() or share < 1
    both = (epochs[0] & epochs[1]).mean()
    assert both == pytest.approx(share**2, abs=0.01), "independent of the epoch before"
    of_long, of_short = epochs[0][LENGTHS > 240_000].mean(), epochs[0][LENGTHS <= 240_000].mean()
    assert of_long == pytest.approx(of_short, abs=0.02), "and of the length"


def test_who_is_padded_depends_on_seed_epoch_and_sample_alone() -> None:
    windows = Windows(3000, 0.2, seed=3)
    together = whole(windows, 5)
    for row in (0, 7, 19_999):
        alone = windows.frames([LENGTHS[row]], [row], 5)
        assert (alone == 3000).tolist() == [together[row]]
    assert (whole(Windows(3000, 0.2, seed=4), 5) != together).any()
    # Known values: a run that goes on with another version of numpy must go on alike.
    assert np.flatnonzero(together)[:8].tolist() == [0, 4, 6, 11, 13, 17, 20, 22]


def sample(seconds: float, tokens: int, number: int = 0) -> Sample:
    frames = round(seconds * 100)
    return Sample(np.zeros(16, np.int16), Tokens([1] * tokens, [1] * tokens), "", 0, str(number), frames)


def test_micro_batches_hold_so_much_audio_and_captions_in_proportion() -> None:
    size = Size(seconds=60, window_seconds=30, tokens=448)
    assert [len(group) for group in size.cut([sample(10, 20)] * 14)] == [6, 6, 2]
    assert [len(group) for group in size.cut([sample(30, 20)] * 3)] == [2, 1]
    assert [len(group) for group in size.cut([sample(1, 448)] * 3)] == [2, 1], "as two whole windows can have"
    assert [len(group) for group in Size(5, 30, 448).cut([sample(30, 9)] * 2)] == [1, 1], "at least a clip"
    mixed = [sample(seconds, 5, number) for number, seconds in enumerate([25, 30, 10, 30, 30, 5, 20])]
    groups = size.cut(mixed)
    assert [clip for group in groups for clip in group] == mixed
    assert all(sum(map(size.of, group)) <= 60 for group in groups)
    assert size.cut([]) == []
