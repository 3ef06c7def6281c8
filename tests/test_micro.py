"""`batch.micro_seconds: auto` takes what the memory holds, and half of it where that was too much."""

from __future__ import annotations

import math
import os
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from configs.run.causes import Cause
from configs.run.events import Ended, Event, MicroSeconds, RankFailed
from configs.run.ledger import History
from configs.run.memory import next_seconds, will_halve
from configs.schema import Model
from tests.forks import Course, Launcher
from tests.making import audit_of_attempts, config_values
from trainer import checkpoint
from trainer.checkpoint import Reader
from trainer.distributed import World
from trainer.engines import KINDS
from trainer.micro import RESERVE, SMALLER, extrapolate, search
from trainer.model import load

GB = 2**30
WINDOW = 30.0


class Ranks:
    """What threads that stand for ranks tell each other."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=10)
        self._values: dict[int, int] = {}

    def minimum(self, rank: int, value: int) -> int:
        self._values[rank] = value
        self._barrier.wait()
        lowest = min(self._values.values())
        self._barrier.wait()
        return lowest


class Rank(World):
    """A rank that is a thread."""

    def __init__(self, rank: int, ranks: Ranks) -> None:
        super().__init__(rank, 2, torch.device("cpu"))
        object.__setattr__(self, "ranks", ranks)

    ranks: Ranks

    def any(self, flag: bool) -> bool:
        return self.ranks.minimum(self.rank, 0 if flag else 1) == 0

    def lowest(self, number: int) -> int:
        return self.ranks.minimum(self.rank, number)


@dataclass
class Card:
    """A model of a GPU's memory, in bytes.

    state: held all the time; floor: what a step takes at least, whatever its windows; noise: share by which
    measurements differ; hidden: what each window beyond the 40th takes more.
    """

    total: int = 80 * GB
    state: int = 17 * GB
    window: int = 2 * GB
    floor: int = 0
    noise: float = 0.0
    hidden: int = 0
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    tried: list[int] = field(default_factory=list)

    @property
    def limit(self) -> int:
        return int((1 - RESERVE) * self.total)

    def need(self, windows: int) -> int:
        more = self.hidden * max(0, windows - 40)
        return self.state + max(self.floor, windows * self.window) + more

    def peak(self, windows: int) -> float:
        self.tried.append(windows)
        measured = self.need(windows) * (1 + self.noise * self.random.uniform(-1, 1))
        return measured if measured <= self.total else math.inf


def searched(*cards: Card, most: int = 10_000) -> list[int]:
    """What each rank finds. Every rank has a card."""
    ranks = Ranks(len(cards))
    answers: dict[int, int] = {}

    def work(rank: int) -> None:
        answers[rank] = search(cards[rank], most, Rank(rank, ranks))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(cards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[rank] for rank in range(len(cards))]


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"total": 24 * GB},
        {"total": 141 * GB, "window": GB // 20, "state": GB},
        {"window": GB // 10, "floor": 20 * GB},
        {"window": GB // 10, "floor": 50 * GB},
    ],
    ids=["turbo", "small card", "small model", "floor", "high floor"],
)
def test_the_search_comes_close_to_what_fits(shape: dict[str, int], noise: float) -> None:
    card = Card(**shape, noise=noise)
    (windows,) = searched(card)
    best = (card.limit - card.state) // card.window
    off = noise * card.total / card.window
    is_linear = card.floor + card.noise == 0
    assert (best - 1 if is_linear else SMALLER * best - off) <= windows <= best + off
    assert len(card.tried) < 20, "each takes a second or two on a GPU"


def test_what_does_not_fit_after_all_is_lowered_until_it_does() -> None:
    card = Card(window=GB, hidden=GB // 2)
    (windows,) = searched(card)
    assert windows == int(SMALLER * card.tried[-2])
    assert card.need(windows) <= card.limit < card.need(card.tried[-2])


def test_all_ranks_try_the_same_and_take_what_the_smallest_card_holds() -> None:
    large, small = Card(), Card(total=40 * GB)
    (alone,) = searched(Card(total=40 * GB))
    assert searched(large, small) == [alone, alone]
    assert large.tried == small.tried


def test_no_more_than_a_rank_can_get_of_a_step() -> None:
    card = Card(window=GB // 10)
    assert searched(card, most=3) == [3]
    assert max(card.tried) <= 3


def test_one_window_is_taken_whether_it_fits_or_not() -> None:
    assert searched(Card(total=19 * GB), most=8) == [1]
    assert searched(Card(total=18 * GB), most=8) == [1]


def test_bytes_at_two_sizes_give_the_size_at_the_limit() -> None:
    assert extrapolate({1: 16, 2: 20}, limit=41, most=99) == 7
    assert extrapolate({1: 16, 2: 20, 4: math.inf}, limit=41, most=5) == 5
    assert extrapolate({1: 16, 2: 16}, limit=41, most=5) == 5, "nothing is known to grow"
    assert extrapolate({1: 16, 2: 20}, limit=12, most=5) == 1
    assert extrapolate({1: 16, 2: math.inf}, limit=41, most=5) == 1


def taken(attempt: int, seconds: float, device: str = "H100", setup: str = "2 ranks") -> MicroSeconds:
    return MicroSeconds(
        attempt=attempt, device=device, setup=setup, seconds=seconds, least=WINDOW, why="the most that fits"
    )


def failed(attempt: int, cause: Cause) -> RankFailed:
    return RankFailed(attempt=attempt, rank=1, node="n", cause=cause, exit_code=1, message="too little")


GPU, HOST = Cause.OUT_OF_GPU_MEMORY, Cause.OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("events", "seconds", "halves"),
    [
        ([], None, False),
        ([taken(0, 480)], 480, False),
        ([taken(0, 480, setup="1 ranks"), taken(1, 480, device="A100")], None, False),
        ([taken(0, 480), failed(0, GPU)], 240, True),
        ([taken(0, 480), failed(0, Cause.LOST_PEER), failed(0, GPU)], 240, True),
        ([taken(0, 480), failed(0, HOST)], 480, False),
        ([taken(0, 120, device="cpu"), failed(0, HOST)], None, True),
        ([taken(0, 480), failed(0, GPU), taken(1, 240), failed(1, Cause.CRASH)], 240, False),
        ([taken(0, 480), failed(0, GPU), taken(1, 240), failed(1, GPU)], 120, True),
        ([taken(0, 480), failed(1, GPU)], 480, False),  # attempt 1 took a number from the config
        ([taken(0, 45), failed(0, GPU)], 30, True),
        ([taken(0, 30), failed(0, GPU)], 30, False),
    ],
)
def test_the_next_start_takes_as_much_or_half(events: list[Event], seconds: float, halves: bool) -> None:
    history = History(events)
    known = next_seconds(history, "H100", "2 ranks")
    assert (known[0] if known else None) == seconds
    last = max((event.attempt for event in events), default=0)
    assert will_halve(history, last) is halves


def test_at_one_window_it_says_what_else_helps() -> None:
    known = next_seconds(History([taken(3, 30), failed(3, GPU)]), "H100", "2 ranks")
    assert known and "rank 1 ran out of memory with 30 s in attempt 3" in known[1]
    assert "model.gradient_checkpointing=true" in known[1]


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory, model: Path, shards: str, launch: Launcher) -> Course:
    return Course(tmp_path_factory.mktemp("micro"), model, shards, launch)


def values(course: Course, name: str, micro_seconds: object, backend: str = "fsdp2") -> dict[str, Any]:
    return config_values(
        name,
        course.folder,
        course.model,
        course.shards,
        engine={"backend": backend, "dtype": "fp32"},
        batch={"global_size": 8, "micro_seconds": micro_seconds},
        evaluate={"every_steps": 1000, "captions": 0, "max_samples": 1},
        checkpoint={"every_steps": 1},
    )


def rank_1_holds_4_seconds() -> None:
    """In a rank: rank 1 runs out of memory with more than 4 s of audio at a time, from step 2 on."""
    from trainer.loop import Training

    take = Training.take

    def taken(training: Any, *arguments: Any) -> None:
        is_large = training.session.size.seconds > 4
        if os.environ["RANK"] == "1" and training.state.step == 2 and is_large:
            raise MemoryError
        take(training, *arguments)

    Training.take = taken


HOLDS_4_SECONDS = "tests.test_micro:rank_1_holds_4_seconds"


def test_a_run_that_runs_out_of_memory_goes_on_with_half_and_the_same_samples(course: Course) -> None:
    """Without anybody who starts it again; later starts remember."""
    config = values(course, "halved", "auto")
    done = course.launch(config, procs=2, before=HOLDS_4_SECONDS, attempts=2)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "too little memory" in done.stderr and "the next start takes half" in done.stderr
    assert "auto takes 4 s: half, as rank 1 ran out of memory with 8 s in attempt 0" in done.stdout
    history = course.run("halved").ledger.read()
    assert [event.seconds for event in history.of(MicroSeconds)] == [8, 4]
    assert [end.cause for end in history.of(Ended)] == [Cause.OUT_OF_MEMORY, Cause.FINISHED]

    assert course.launch(values(course, "whole", 4), procs=2).returncode == 0
    taken, whole = (audit_of_attempts(course.run(name).path) for name in ("halved", "whole"))
    assert {step: taken[int(step >= 2), step].keys for step in range(4)} == {
        step: whole[0, step].keys for step in range(4)
    }


def test_a_fixed_number_is_not_halved(course: Course) -> None:
    done = course.launch(values(course, "fixed", 5), procs=2, before=HOLDS_4_SECONDS)
    assert done.returncode == 1
    assert "Lower batch.micro_seconds (5 now" in done.stderr and "or write auto" in done.stderr
    assert not course.run("fixed").ledger.read().of(MicroSeconds)


def engine_is_tried() -> None:
    """In a rank: before the first step the engine is asked what the largest samples take, as on a GPU."""
    from trainer import start
    from trainer.micro import Gpu, micro_seconds, search

    for name in ("reset_peak_memory_stats", "max_memory_allocated", "memory_reserved", "empty_cache"):
        setattr(torch.cuda, name, lambda *_: 0)
    torch.cuda.set_per_process_memory_fraction = lambda *_: None
    torch.cuda.mem_get_info = lambda *_: (100, 100)

    def tried(config: Any, run: Any, attempt: int, world: Any, captioner: Any, engine: Any) -> float:
        gpu = Gpu(engine, captioner, world.device)
        assert search(gpu, 3, world) == 3
        gpu.close()
        return micro_seconds(config, run, attempt, world, captioner, engine)

    start.micro_seconds = tried


@pytest.mark.parametrize("backend", ["zero2", "fsdp2"])
def test_trying_sizes_leaves_nothing_behind(course: Course, backend: str) -> None:
    """Neither a gradient nor a rank that waits: the weights in the end are equal to the last bit."""
    for name, before in (("plain", ""), ("tried", "tests.test_micro:engine_is_tried")):
        config = values(course, f"{backend}-{name}", "auto", backend)
        done = course.launch(config, procs=2, before=before)
        assert done.returncode == 0, (done.stdout, done.stderr)
    plain, tried = (
        Reader(checkpoint.find(course.run(f"{backend}-{name}").checkpoints)[0]) for name in ("plain", "tried")
    )
    assert plain.manifest.step == tried.manifest.step == 4
    for name, parameter in plain.manifest.parameters.items():
        for kind in KINDS:
            piece = name, kind, 0, math.prod(parameter["shape"])
            assert torch.equal(plain(*piece), tried(*piece)), piece


def test_pretrained_weights_are_trained_as_others_are(tmp_path: Path, model: Path) -> None:
    """transformers hands them out for use, and a model in use keeps no activations to compute again."""
    folder = tmp_path / "pretrained"
    shutil.copytree(model, folder)
    WhisperForConditionalGeneration(WhisperConfig.from_pretrained(model)).save_pretrained(folder)
    assert load(Model(name_or_path=str(folder)), seed=0).model.encoder.training
