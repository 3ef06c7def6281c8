"""Ranks have nearly the same work at every step, and what cannot be known or helped is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import WhisperConfig

from configs.load import validate
from configs.schema import RunConfig
from data.balance import EVEN, deal
from data.order import rank_lanes
from launch.doctor import _balance
from launch.remarks import on_samples
from tests.evaluators import open_loaders
from tests.making import config_values
from trainer.distributed import World
from trainer.loaders import Loaders

seeded = settings(derandomize=True, deadline=None, max_examples=100, phases=[Phase.generate, Phase.shrink])
FULL_WINDOW = 5 * 10**12
"""FLOPs of 30 s in whisper-large-v3-turbo, about; 0 is an empty slot."""
works = st.tuples(st.integers(1, 24), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.int64, shape, elements=st.integers(0, FULL_WINDOW))
)


def owners(lanes: int, ranks: int) -> np.ndarray:
    """The rank that owns each lane."""
    return np.repeat(np.arange(ranks), [len(rank_lanes(rank, ranks, lanes)) for rank in range(ranks)])


def loads(work: np.ndarray, taker: np.ndarray, ranks: int) -> np.ndarray:
    """Work of each rank at one step, (ranks,)."""
    return np.array([work[taker == rank].sum() for rank in range(ranks)])


@seeded
@given(works, st.integers(1, 8))
def test_ranks_are_even_or_no_move_would_help(works, ranks) -> None:
    takers = deal(works, ranks)
    assert takers.shape == works.shape
    for work, taker in zip(works.T, takers.T, strict=True):
        assert set(taker) <= set(range(ranks)), "each sample has one rank"
        load = loads(work, taker, ranks)
        assert load.max() <= loads(work, owners(len(work), ranks), ranks).max()
        if load.max() > EVEN * load.mean():
            of_fullest = work[(taker == load.argmax()) & (work > 0)]
            assert all(cost >= load.max() - load.min() for cost in of_fullest)


@seeded
@given(works, st.integers(1, 8))
def test_dealing_depends_on_the_step_alone(works, ranks) -> None:
    takers = deal(works, ranks)
    assert np.array_equal(deal(works.copy(), ranks), takers)
    for step in range(works.shape[1]):
        assert np.array_equal(deal(works[:, step : step + 1], ranks)[:, 0], takers[:, step])


def test_dealing_is_the_same_everywhere() -> None:
    """In numbers. Ranks that came to different results would compute a sample twice, or not at all."""
    work = np.array([[30, 10, 10, 10], [30, 30, 10, 10], [10, 10, 10, 10], [10, 30, 20, 10], [5, 0, 10, 10]])
    assert deal(work, 2).T.tolist() == [[1, 0, 0, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]


def test_what_is_even_already_stays() -> None:
    for work in (np.full((64, 8), FULL_WINDOW), np.zeros((64, 8), np.int64)):
        assert np.array_equal(deal(work, 8), np.repeat(owners(64, 8)[:, None], 8, axis=1))
    one_each = np.random.default_rng(0).integers(1, FULL_WINDOW, (8, 50))
    assert np.array_equal(deal(one_each, 8), np.repeat(np.arange(8)[:, None], 50, axis=1))


def test_the_references_mix_is_evened_out_by_moving_a_tenth() -> None:
    """57 % of 10 s, the others of any length, a fifth at the whole window; eight samples on each of 8
    ranks."""
    random = np.random.default_rng(0)
    shape = (64, 200)
    seconds = np.where(random.random(shape) < 0.57, 10.0, random.uniform(2, 30, shape))
    work = np.where(random.random(shape) < 0.2, 30.0, seconds).round(2) * 100
    takers = deal(work.astype(np.int64), 8)
    load = np.stack([np.where(takers == rank, work, 0).sum(axis=0) for rank in range(8)])
    assert (load.max(axis=0) / load.mean(axis=0)).mean() < 1.035
    assert (takers != owners(64, 8)[:, None]).mean() < 0.12


Make = Callable[..., Loaders]


@pytest.fixture
def made(model: Path, shards: str, tmp_path: Path) -> Make:
    """The loaders of a run on one of some ranks."""

    def made(*, full: bool = True, ranks: int = 2, rank: int = 0, size: int = 8, **data: object) -> Loaders:
        config = config_of(tmp_path, model, shards, size, **data)
        world = World(rank, ranks, torch.device("cpu"))
        return open_loaders(config, world, WhisperConfig.from_pretrained(model), full=full)

    return made


def config_of(folder: Path, model: Path, shards: str, size: int, **data: object) -> RunConfig:
    return validate(
        config_values("run", folder, model, shards, batch={"global_size": size})
        | {"data": config_values("run", folder, model, shards)["data"] | data},
        "test",
    )


def is_balanced(loaders: Loaders) -> bool:
    """Whether what this rank trains on is dealt."""
    loader = loaders.training(range(4))
    loader.close()
    return loader.balance is not None


def test_nothing_moves_where_that_would_help_nobody(made: Make, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_balanced(made())
    assert not is_balanced(made(ranks=1))
    assert not is_balanced(made(ranks=8)), "one sample each"
    assert not is_balanced(made(window="full")) and not is_balanced(made(full_share=1.0))
    loader = made().validation([0, 1, 2, 3], per_rank=1)
    loader.close()
    assert loader.balance is None, "validation"
    assert capsys.readouterr().out == ""


def test_a_quick_index_moves_nothing_and_says_what_a_full_one_would_bring(
    made: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = made(full=False)
    assert not is_balanced(replace(quick, world=World(1, 2, torch.device("cpu"))))
    assert not is_balanced(replace(quick, world=World(0, 1, torch.device("cpu"))))
    assert capsys.readouterr().out == "", "rank 0 says it, where there are others"
    assert not is_balanced(quick)
    (said,) = capsys.readouterr().out.splitlines()
    samples = len(quick.dataset.training)
    assert said.startswith(f"the lengths of {samples} of {samples} clips are unknown (quick index)")
    assert "`python -m tools.index CONFIG`" in said


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine from which jobs can be submitted."""
    folder = tmp_path / "slurm-commands"
    folder.mkdir()
    for name in ("sbatch", "squeue", "sinfo"):
        (folder / name).write_text("#!/bin/sh\nexit 0\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.usefixtures("slurm")
def test_submit_and_doctor_say_where_each_process_has_but_one_sample(
    model: Path, shards: str, tmp_path: Path
) -> None:
    def remarks(size: int, **data: object) -> list[str]:
        config = config_of(tmp_path, model, shards, size, **data)
        config = config.model_copy(
            update={"slurm": config.slurm.model_copy(update={"nodes": "1-4", "gpus_per_node": 2})}
        )
        _, *of_submit = on_samples(config)
        of_doctor = [finding.details for finding in _balance(config)]
        assert of_submit == [f"note: {remark}" for remark in of_doctor]
        return of_doctor

    (said,) = remarks(8)
    assert said.startswith("one sample for each of 8 processes (batch.global_size=8)")
    assert "with 32, four each" in said
    assert len(remarks(15)) == 1 and remarks(16) == []
    assert remarks(8, window="full") == remarks(8, full_share=1.0) == []
