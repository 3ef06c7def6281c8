"""A run that learns nothing ends; a bad clip among few, wherever it comes, ends none."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from configs.load import validate
from data.order import Order
from trainer.tally import Complaint, Tally

SLOTS = 8
"""Samples of a step."""


def tally(
    *sizes: int,
    weights: tuple[float, ...] = (),
    first_step: int = 0,
    total_steps: int = 10_000,
    **data: object,
) -> Tally:
    """Of sources with so many samples."""
    weights = weights or (1.0,) * len(sizes)
    sources = [
        {"name": f"s{number}", "shards": ["x.tar"], "weight": weight} for number, weight in enumerate(weights)
    ]
    config = validate(
        {
            "run": {"name": "run"},
            "model": {"name_or_path": "x"},
            "data": {"sources": sources, **data},
            "batch": {"global_size": SLOTS},
            "optim": {"max_steps": total_steps},
        },
        "test",
    )
    each_alone, source = np.arange(sum(sizes) + 1), np.repeat(np.arange(len(sizes)), sizes)
    order = Order(each_alone, source, weights, seed=0, global_batch=SLOTS, shuffle_window=4)
    return Tally(config, order, sizes, first_step, total_steps)


Counts = tuple[int, int, int]
"""Usable, bad and too long samples of a step, of one source."""


def complaint(tally: Tally, steps: Iterable[Counts]) -> tuple[int, Complaint] | None:
    """Number of the step at which there is something to complain of, and what."""
    for number, (usable, bad, too_long) in enumerate(steps, 1):
        if found := tally.add([usable], [bad + too_long], bad):
            return number, found
    return None


def said(tally: Tally, steps: Iterable[Counts]) -> tuple[int, str]:
    """The same in words."""
    found = complaint(tally, steps)
    assert found is not None
    return found[0], found[1].what


def test_a_first_step_without_a_sample_is_the_last() -> None:
    assert said(tally(100), [(0, 8, 0)]) == (1, "none of the first 8 samples of epoch 1 can be used")
    assert complaint(tally(100), [(1, 7, 0)]) is None


def test_an_epoch_that_begins_without_a_sample_is_the_last() -> None:
    """Its shards may have gone bad meanwhile."""
    first_epoch = [(8, 0, 0)] * 12 + [(4, 0, 0)]
    assert said(tally(100), [*first_epoch, (0, 8, 0)]) == (
        14,
        "none of the first 8 samples of epoch 2 can be used",
    )


def test_a_resumed_attempt_may_begin_with_a_short_step_of_one_bad_sample() -> None:
    """The last one of epoch 1: 97 samples are 12 steps and one more."""
    assert complaint(tally(97, first_step=12), [(0, 1, 0), *[(8, 0, 0)] * 12, (0, 1, 0)]) is None
    assert said(tally(97, first_step=11), [(0, 8, 0)]) == (
        1,
        "none of the first 8 samples of this attempt can be used",
    )


def test_half_of_the_clips_may_be_too_long_wherever_they_come() -> None:
    """Eight in a row are chance then, 32 are not."""
    assert complaint(tally(100), [(0, 0, 8), (8, 0, 0)]) is None
    assert said(tally(100), [(0, 0, 8)] * 9)[0] == 4


@pytest.mark.parametrize(("samples", "at"), [(3, 1), (10, 1), (12, 1)])
def test_a_small_set_of_which_nothing_can_be_used_is_refused(samples: int, at: int) -> None:
    steps = [(0, min(SLOTS, samples - begin), 0) for begin in range(0, samples, SLOTS)]
    assert said(tally(samples), steps)[0] == at


def test_a_run_that_is_over_before_it_has_learnt_anything_is_refused() -> None:
    assert said(tally(100, total_steps=2), [(0, 0, 8), (0, 0, 8)])[0] == 2
    assert complaint(tally(100, first_step=1, total_steps=2), [(0, 0, 8)]) is None, "it has, before"


def test_one_bad_clip_of_fifty_ends_no_run() -> None:
    epoch = [(7, 1, 0), *[(8, 0, 0)] * 5, (2, 0, 0)]
    assert complaint(tally(50), epoch * 100) is None


def test_half_of_a_small_set_is_too_much_unless_it_is_allowed() -> None:
    halves = [(4, 4, 0)] * 8
    assert said(tally(64, max_bad_fraction=0.05), halves) == (
        2,
        "8 of 16 samples could not be used, more than data.max_bad_fraction=0.05 allows",
    )
    assert complaint(tally(64, max_bad_fraction=0.5), halves) is None


def test_more_than_the_allowed_share_of_an_epoch_is_too_much() -> None:
    """As ever: of a thousand samples at least."""
    assert said(tally(4000), [(7, 1, 0)] * 20)[0] == 11
    assert complaint(tally(4000), [(7, 1, 0), *[(8, 0, 0)] * 14] * 30) is None


@pytest.mark.parametrize(("too_long", "at"), [(4, None), (5, 100)])
def test_steps_that_stay_mostly_empty_are_told(too_long: int, at: int | None) -> None:
    """Not those that an epoch's end makes short: of 9 samples every second step has one."""
    found = complaint(tally(4000), [(SLOTS - too_long, 0, too_long)] * 200)
    assert (found and found[0]) == at
    assert complaint(tally(9), [(8, 0, 0), (1, 0, 0)] * 200) is None
    if found:
        assert found[1].what == (
            "500 of 800 samples of the last 100 steps could not be used: steps are 38% of what"
            " batch.global_size=8 asks for"
        )


def test_a_source_of_which_nothing_can_be_used_is_named_whatever_the_others_are() -> None:
    one = tally(400, 400)
    found = [one.add([4, 0], [0, 4], 0) for _ in range(25)]
    assert found[:24] == [None] * 24
    assert found[24] == Complaint("source s1: none of its first 100 samples can be used", source="s1")


def test_a_small_source_is_given_one_pass() -> None:
    one = tally(61, 3)  # an epoch of 8 steps
    steps = [one.add([8, 0], [0, 0], 0), *(one.add([7, 0], [0, 1], 0) for _ in range(3))]
    assert steps[:3] == [None] * 3
    assert steps[3] == Complaint("source s1: none of its first 3 samples can be used", source="s1")


def test_a_source_of_which_a_run_takes_few_is_named_at_its_end() -> None:
    """Of 200 samples an epoch takes two."""
    for total_steps, at in ((8, 8), (100, None)):
        one = tally(64, 200, weights=(1.0, 0.01), total_steps=total_steps, max_bad_fraction=1)
        found = [one.add([7, 0], [0, 1], 1) for _ in range(8)]
        assert next((number for number, what in enumerate(found, 1) if what), None) == at


def test_the_bad_one_of_two_that_comes_twice_is_no_source_without_samples() -> None:
    """It was the last of an epoch that an attempt took up, and is the first of the next one."""
    one = tally(62, 2, first_step=7)
    assert one.add([7, 0], [0, 1], 1) is None
    assert one.add([7, 0], [0, 1], 1) is None
    assert one.add([7, 1], [0, 0], 0) is None


def test_a_part_of_a_source_may_be_bad_where_an_epoch_takes_no_more_of_it() -> None:
    """A tenth of 30 samples an epoch; a pass over them is ten epochs."""
    one = tally(61, 30, weights=(1.0, 0.1), max_bad_fraction=1)
    epoch = [one.add([7, 0], [0, 1], 1) for _ in range(3)] + [one.add([8, 0], [0, 0], 0) for _ in range(5)]
    assert epoch == [None] * 8
    later = [one.add([7, 0], [0, 1], 1) for _ in range(27)]
    assert later[:26] == [None] * 26 and later[26] is not None and later[26].source == "s1"
