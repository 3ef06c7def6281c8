"""Which sample comes when does not depend on ranks, and each comes as often as its weight says."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.load import validate
from configs.schema import Data
from data.order import (
    EMPTY,
    ORDER_VERSION,
    RUN_BYTES,
    RUNS_PER_LANE,
    Listed,
    Order,
    cut_runs,
    random_keys,
    rank_lanes,
)
from data.passes import passes
from tests.making import config_values
from trainer.changes import begins_new_epoch, check_changes, pinned

seeded = settings(derandomize=True, deadline=None, max_examples=100, phases=[Phase.generate, Phase.shrink])


def order_of(shards: list[int], weights: list[float], seed: int, batch: int, window: int) -> Order:
    """Shards of so many samples each, of 1 kB to 1 MB; they belong to the sources in turn."""
    shard = np.repeat(np.arange(len(shards)), shards)
    size = np.random.default_rng(seed).integers(1_000, 1_000_000, len(shard))
    runs = cut_runs(shard, size, batch)
    return Order(runs, shard[runs[:-1]] % len(weights), weights, seed, batch, window)


def source_of(shards: list[int], sources: int) -> np.ndarray:
    return np.repeat(np.arange(len(shards)) % sources, shards)


sizes = st.lists(st.integers(1, 40), min_size=4, max_size=8)
mixes = st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0]), min_size=1, max_size=4)
orders = st.builds(order_of, sizes, mixes, st.integers(0, 2**33), st.integers(1, 16), st.integers(1, 50))


@seeded
@given(sizes, mixes, st.integers(0, 2**33), st.integers(1, 16), st.integers(1, 50))
def test_every_sample_comes_exactly_weight_times(shards, weights, seed, batch, window) -> None:
    order = order_of(shards, weights, seed, batch, window)
    seen = np.concatenate([order.lanes(epoch, range(batch)).ravel() for epoch in range(4)])
    counts = np.bincount(seen[seen != EMPTY], minlength=sum(shards))
    assert counts.tolist() == (4 * np.array(weights)[source_of(shards, len(weights))]).tolist()


@seeded
@given(st.floats(0.05, 3), st.integers(1, 60), st.integers(0, 9))
def test_any_weight_is_kept_to_within_one_pass(weight, samples, seed) -> None:
    order, epochs = order_of([samples], [weight], seed, 4, 16), 7
    seen = np.concatenate([order.lanes(epoch, range(4)).ravel() for epoch in range(epochs)])
    counts = np.bincount(seen[seen != EMPTY], minlength=samples)
    assert np.abs(counts - epochs * weight).max() <= 1 + 1e-9


@seeded
@given(orders, st.integers(0, 3))
def test_any_number_of_ranks_takes_the_same_batches_in_the_same_order(order, epoch) -> None:
    whole = order.lanes(epoch, range(order.global_batch))
    for ranks in range(1, 9):
        lanes = [rank_lanes(rank, ranks, order.global_batch) for rank in range(ranks)]
        assert np.array_equal(np.concatenate([order.lanes(epoch, some) for some in lanes]), whole)
        assert max(map(len, lanes)) - min(map(len, lanes)) <= 1


@seeded
@given(orders, st.integers(0, 3), st.data())
def test_a_lane_depends_on_seed_epoch_and_lane_alone(order, epoch, data) -> None:
    lane = data.draw(st.integers(0, order.global_batch - 1))
    first, last = data.draw(st.integers(0, lane)), data.draw(st.integers(lane, order.global_batch - 1))
    again = Order(
        order.runs,
        order.run_source,
        order.weights,
        order.seed,
        order.global_batch,
        order.shuffle_window,
    )
    again.lanes(epoch + 1, range(order.global_batch))  # what was asked for before changes nothing
    assert np.array_equal(
        order.lanes(epoch, range(first, last + 1))[lane - first], again.lanes(epoch, range(lane, lane + 1))[0]
    )


@seeded
@given(orders, st.integers(0, 3), st.data())
def test_some_steps_are_those_of_the_whole_epoch(order, epoch, data) -> None:
    lanes = range(order.global_batch)
    whole = order.lanes(epoch, lanes)
    last = data.draw(st.integers(0, whole.shape[1]))
    first = data.draw(st.integers(0, last))
    assert np.array_equal(order.lanes(epoch, lanes, range(first, last)), whole[:, first:last])
    listed = Listed(whole.ravel().tolist(), order.global_batch)
    assert np.array_equal(listed.lanes(0, lanes, range(first, last)), listed.lanes(0, lanes)[:, first:last])


@seeded
@given(orders)
def test_the_position_is_one_integer(order) -> None:
    steps = [(epoch, step) for epoch in range(3) for step in range(order.steps_in(epoch))]
    assert [order.locate(step) for step in range(len(steps))] == steps
    assert [order.steps_of(epochs) for epochs in range(4)] == [
        sum(epoch < epochs for epoch, _ in steps) for epochs in range(4)
    ]
    assert [order.lanes(epoch, range(1)).shape[1] for epoch in range(3)] == [
        order.steps_in(epoch) for epoch in range(3)
    ]


@seeded
@given(orders, st.integers(0, 3))
def test_empty_slots_are_at_the_last_step_only(order, epoch) -> None:
    rows = order.lanes(epoch, range(order.global_batch))
    assert np.all(rows[:, :-1] != EMPTY)
    assert np.sum(rows != EMPTY) == order.samples_in(epoch)
    assert rows.size - order.samples_in(epoch) < order.global_batch


@seeded
@given(st.integers(0, 2**33), st.integers(0, 2**33), st.integers(0, 100), st.integers(0, 100))
def test_another_seed_or_epoch_is_another_order(seed, other_seed, epoch, other_epoch) -> None:
    runs = cut_runs(np.zeros(200), np.full(200, 1_000), 4)
    one, other = (
        Order(runs, np.zeros(len(runs) - 1), [1.0], s, 4, 16).lanes(e, range(4))
        for s, e in [(seed, epoch), (other_seed, other_epoch)]
    )
    same = (seed, epoch) == (other_seed, other_epoch)
    assert np.array_equal(one, other) == same
    assert np.array_equal(np.sort(one), np.sort(other)) == same, "lanes hold other samples, too"


@seeded
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 2 * RUN_BYTES) | st.integers(1, 2_000)),
        min_size=1,
        max_size=300,
    ),
    st.integers(1, 4),
)
def test_runs_cover_all_samples_inside_shards_and_the_byte_limit(samples, batch) -> None:
    shard, size = np.array(sorted(shard for shard, _ in samples)), np.array([size for _, size in samples])
    limit = min(RUN_BYTES, size.sum() // (RUNS_PER_LANE * batch))
    runs = cut_runs(shard, size, batch)
    assert runs[0] == 0 and runs[-1] == len(samples) and np.all(np.diff(runs) > 0)
    for start, end in itertools.pairwise(runs):
        assert len(set(shard[start:end])) == 1
        assert (
            end - start == 1 or size[start : end - 1].sum() < limit
        )  # the sample that reaches the limit ends the run


def test_the_order_is_the_same_under_every_version_of_numpy() -> None:
    """In numbers. Whoever changes them gives the order another ORDER_VERSION: runs that go on are told
    then."""
    assert random_keys(2, 7, 1, 0).tolist() == [10880027834572141776, 9343578914191250935]
    assert random_keys(2, 2**33, 2, 5, 3).tolist() == [11914143290752745678, 908092971789093623]
    assert ORDER_VERSION == 2
    runs = np.arange(0, 25, 2)  # of two samples each; those of the second source come every second epoch
    order = Order(runs, np.repeat([0, 1], 6), [1.0, 0.5], 7, 4, shuffle_window=3)
    assert order.lanes(0, range(4)).tolist() == [
        [9, 8, 6, 7, -1],
        [17, 16, 22, 2, 23],
        [1, 3, 0, 12, -1],
        [13, 4, 5, 11, 10],
    ]
    assert order.lanes(1, range(4)).tolist() == [
        [20, 11, 10, 21, -1],
        [6, 1, 0, 7, 8],
        [18, 9, 19, 4, -1],
        [15, 5, 14, 3, 2],
    ]


def test_a_run_of_a_version_with_another_order_is_told_and_goes_on_when_allowed(tmp_path: Path) -> None:
    """Its checkpoint says nothing of an order, or names another one."""
    now = pinned(validate(config_values("run", tmp_path, tmp_path, "*.tar"), "test"), "digest")
    unnamed = {name: value for name, value in now.items() if name != "order"}
    for before, version in ((unnamed, 1), ({**now, "order": 3}, 3)):
        with pytest.raises(ConfigError) as caught:
            check_changes(before, now, [], tmp_path)
        said = str(caught.value)
        assert f": {version} -> {ORDER_VERSION}\n" in said and "version of the order" in said
        assert "run.allow_change=[order]' (a new epoch begins then)" in said
        check_changes(before, now, ["order"], tmp_path)
    assert begins_new_epoch(["order"])


def tempered(temperature: float, *weights: float) -> Data:
    sources = [{"name": f"source{n}", "shards": ["x"], "weight": weight} for n, weight in enumerate(weights)]
    return Data.model_validate({"temperature": temperature, "sources": sources})


def test_temperature_evens_sources_out_in_an_epoch_of_the_same_size() -> None:
    sizes = [1000, 100, 50]
    assert passes(tempered(1.0, 0.3, 1.0, 1.1), sizes) == [0.3, 1.0, 1.1], "bit for bit"
    in_epoch = 1000 + 200 + 50
    assert passes(tempered(math.inf, 1, 2, 1), sizes) == pytest.approx([in_epoch / 3 / n for n in sizes])
    for temperature in (0.1, 0.5, 2.0, 5.0):
        counts = np.array(passes(tempered(temperature, 1, 2, 1), sizes)) * sizes
        expected = np.array([1000, 200, 50]) ** (1 / temperature)
        assert counts == pytest.approx(in_epoch * expected / expected.sum())
    coldest = passes(tempered(1e-6, 1, 2, 1), sizes)
    assert coldest == pytest.approx([1.25, 0, 0]), "nothing overflows"


def test_the_passes_that_temperature_makes_come_out_exactly_over_epochs() -> None:
    """Of 400, 100 and 20 samples equal shares are 173.3: 0.433, 1.733 and 8.667 passes."""
    sizes, epochs = [400, 100, 20], 30
    source = np.repeat(np.arange(3), sizes)
    runs = cut_runs(source, np.full(len(source), 1_000), 8)
    order = Order(runs, source[runs[:-1]], passes(tempered(math.inf, 1, 1, 1), sizes), 3, 8, 16)
    seen = np.concatenate([order.lanes(epoch, range(8)).ravel() for epoch in range(epochs)])
    counts = np.bincount(seen[seen != EMPTY], minlength=len(source))
    for number, size in enumerate(sizes):
        assert set(counts[source == number]) == {round(epochs * sum(sizes) / 3 / size)}
    by_epoch = [order.samples_in(epoch) for epoch in range(epochs)]
    assert sum(by_epoch) == epochs * sum(sizes)
    assert all(abs(count - sum(sizes)) <= 3 * np.diff(runs).max() for count in by_epoch)


CHANGED = {
    "data.temperature": {"temperature": 3},
    "data.style_drop": {"style_drop": 0.1},
    "data.augment.mix": {"augment": {"mix": 0.2}},
    "data.augment.spec_augment.time_masks": {"augment": {"spec_augment": {"time_masks": 2}}},
    "data.sources.captions": {"sources": [{"name": "sounds", "shards": ["*.tar"], "loss_weight": 2}]},
}


@pytest.mark.parametrize(("name", "settings"), CHANGED.items(), ids=CHANGED)
def test_a_run_does_not_go_on_with_samples_changed_or_weighed_otherwise(
    tmp_path: Path, name: str, settings: dict[str, object]
) -> None:
    """Unless that is allowed by name. A checkpoint that does not name these settings yet had none of them."""
    values = config_values("run", tmp_path, tmp_path, "*.tar")
    before = pinned(validate(values, "test"), "digest")
    now = pinned(validate(values | {"data": values["data"] | settings}, "test"), "digest")
    earlier = {key: value for key, value in before.items() if "augment" not in key}
    earlier = {
        key: value for key, value in earlier.items() if key not in ("data.temperature", "data.style_drop")
    }
    earlier["data.sources.captions"] = [source[:3] for source in before["data.sources.captions"]]
    check_changes(earlier, before, [], tmp_path)
    for checkpoint in (before, earlier):
        with pytest.raises(ConfigError, match=re.escape(f"run.allow_change=[{name}]")) as caught:
            check_changes(checkpoint, now, [], tmp_path)
        assert f"  {name}: " in str(caught.value)
        assert ("a new epoch begins" in str(caught.value)) == (name == "data.temperature")
        check_changes(checkpoint, now, [name], tmp_path)


def test_an_epoch_mixes_the_sources_from_the_start() -> None:
    order = order_of([500] * 8, [1.0, 1.0], 3, 8, 64)
    rows = order.lanes(0, range(8))
    share = np.mean(source_of([500] * 8, 2)[rows[:, : rows.shape[1] // 5]])
    assert 0.3 < share < 0.7


@pytest.fixture(scope="module")
def large() -> tuple[Order, np.ndarray]:
    """The published captioner's data: 3.1 million samples in 7 sources; sizes as an index has them."""
    clips = [1_760_000, 236_000, 372_000, 178_000, 327_000, 175_000, 72_000]
    weights = [0.5, 1.0, 1.0, 1.5, 1.0, 2.0, 1.0]
    total = sum(clips)
    source, size = np.repeat(np.arange(7), clips), np.random.default_rng(0).integers(20_000, 400_000, total)
    runs = cut_runs(np.arange(total) // 1_000 + 10_000 * source, size, 64)
    return Order(runs, source[runs[:-1]], weights, 0, 64, 256), source


def test_three_million_samples_are_dealt_to_a_rank(large) -> None:
    order, source = large
    expected = 880_000 + 236_000 + 372_000 + 267_000 + 327_000 + 350_000 + 72_000
    assert order.samples_in(0) + order.samples_in(1) == 2 * expected
    rows = order.lanes(0, rank_lanes(3, 8, 64))
    assert rows.shape == (8, order.steps_in(0))
    assert np.sum(rows != EMPTY) == pytest.approx(order.samples_in(0) / 8, abs=8)
    shares = np.bincount(source[rows[rows != EMPTY]], minlength=7) / np.sum(rows != EMPTY)
    assert shares == pytest.approx(np.array([880, 236, 372, 267, 327, 350, 72]) / 2504, abs=0.01)
    twice = np.bincount(rows[rows != EMPTY], minlength=len(source))
    assert twice.max() <= 2
