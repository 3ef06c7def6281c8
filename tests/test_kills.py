"""A run that is killed anywhere, and resumed on another number of ranks and under the other engine, is the
run that nobody killed."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.run.events import AttemptBegan, CheckpointSaved, Evaluated, TrainingBegan
from configs.run.folder import RunDir
from tests.forks import Course, Kill, Launcher
from tests.making import audit_of_attempts, config_values, make_clips, run_program
from trainer import checkpoint
from trainer.checkpoint import Reader

STEPS, GLOBAL, EVERY = 24, 7, 2
"""7 samples do not divide by 2, 3 or 4 ranks, and an epoch ends with a short batch."""
WORLDS = (1, 2, 3, 4)
BACKENDS = ("zero2", "fsdp2")


class Killed(Course):
    """Runs over two sources, of which each sample comes every second epoch or twice in each."""

    def config(self, name: str, backend: str = "zero2", micro: int = 4) -> dict[str, Any]:
        values = config_values(
            name,
            self.folder,
            self.model,
            self.shards,
            optim={"max_steps": STEPS, "lr": 3e-4},
            batch={"global_size": GLOBAL, "micro_seconds": micro},
            engine={"backend": backend},
            checkpoint={"every_steps": EVERY, "keep_last": 2},
            evaluate={"every_steps": 6, "captions": 1, "max_samples": 4},
        )
        weights = {"rare": 0.5, "often": 2}
        sources = [
            {"name": name, "shards": [f"{self.shards}/{name}/*.tar"], "weight": weight, "validation": 0.15}
            for name, weight in weights.items()
        ]
        return values | {"data": {**values["data"], "sources": sources}}


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory, model: Path, launch: Launcher) -> Killed:
    """With the uninterrupted run `whole`, on one rank. One of the clips that come twice an epoch has a hole,
    which is found when it is decoded."""
    folder = tmp_path_factory.mktemp("kills")
    for name, numbers in {"rare": range(20), "often": range(20, 40)}.items():
        table = make_clips(folder / f"clips-{name}", numbers, ("flac",))
        if name == "often":
            spoilt = table.parent / "clip0031.flac"
            content = spoilt.read_bytes()
            spoilt.write_bytes(content[:10_000] + bytes(10_000) + content[20_000:])
        assert run_program("tools.pack", table, folder / name).returncode == 0
    course = Killed(folder, model, str(folder), launch)
    assert launch(course.config("whole")).returncode == 0
    return course


def anywhere(seed: int) -> Callable[[int], Kill]:
    """Some time within half a second of the first step: a fast machine is not done then."""
    return lambda turn: Kill(
        "trainer.loop:learning_rate", delay=random.Random(f"{seed} {turn}").uniform(0, 0.5)
    )


def at(function: str, *nth: int, after: bool = False) -> Callable[[int], Kill]:
    """At a call of a function, in turn at the numbers `nth`; else at the first."""
    return lambda turn: Kill(function, nth[turn % len(nth)] if nth else 1, after)


POINTS = {
    "while starting": at("trainer.start:Start._dataset"),
    "while loading": at("trainer.checkpoint:Reader._read", 3, 40),
    "as the config is accepted": at("configs.run.proposal:Proposal.accept", after=True),
    "between gradient and update": at("trainer.loop:learning_rate", 4, 3, 5),
    "after an update": at("trainer.loop:Training.check_update", 3, 4),
    "after a snapshot": at("trainer.writer:Snapshot.take", 2, 1, after=True),
    "as the writing begins": at("trainer.writer:_Job._write", 2, 1),
    "before a file is synced": at("os:fsync", 1, 4),
    "before a done-file or manifest": at("trainer.writer:write_synced", 2, 4, 3),
    "before the rename": at("pathlib:Path.rename", 2, 1),
    "between rename and cleaning": at("pathlib:Path.rename", 2, 1, after=True),
    "while deleting": at("shutil:rmtree"),
    "in the evaluation": at("trainer.evaluate:token_losses", 1, 2),
    "while captions are made": at("trainer.listening:Listener.listen"),
    "at any moment": anywhere(1),
    "at any other moment": anywhere(2),
}
ON_RANK_0 = {
    "as the config is accepted",
    "before the rename",
    "between rename and cleaning",
    "while deleting",
}


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_on_every_number_of_ranks_and_resumed_on_another(
    course: Killed, launch: Launcher, point: str
) -> None:
    """Four kills: one rank or the whole node, in turn. Then it is finished."""
    number = list(POINTS).index(point)
    run = course.run(f"killed-{number}")
    sizes = WORLDS[number % 4 :] + WORLDS[: number % 4]
    for turn, procs in enumerate(sizes):
        kill = POINTS[point](turn)
        if point == "while loading" and turn == 0:  # there is nothing to load yet
            kill = Kill("trainer.loop:learning_rate", 4)
        victim = None if (number + turn) % 2 else 0 if point in ON_RANK_0 else procs - 1
        kill = replace(kill, rank=victim)
        done = launch(
            course.config(run.path.name, BACKENDS[(number + turn) % 2], micro=1 + turn),
            procs=procs,
            kill=kill,
        )
        assert (
            done.returncode == -9 if victim is None else f"rank {victim} was killed by SIGKILL" in done.stderr
        ), (kill, done)
    assert launch(course.config(run.path.name, BACKENDS[number % 2]), procs=sizes[0] % 4 + 1).returncode == 0

    same_samples(run, course.run("whole"))
    nothing_lost(run)
    expected, found = last_loss(course.run("whole")), last_loss(run)
    print(f"{point}: last validation loss {found:.6f}, uninterrupted {expected:.6f}")
    assert found == pytest.approx(expected, abs=1e-3)
    tidy(run)


def same_samples(run: RunDir, whole: RunDir) -> None:
    """Every step that all ranks have taken in an attempt has the uninterrupted run's samples, in its order;
    what a kill cut short has a part of them."""
    expected = {step: taken for (_, step), taken in audit_of_attempts(whole.path).items()}
    assert sorted(expected) == list(range(STEPS))
    assert (
        any(taken.rejected for taken in expected.values())
        and len({len(taken.keys) for taken in expected.values()}) > 1
    )
    complete = set()
    ranks = {line.attempt: line.ranks for line in run.ledger.read().of(AttemptBegan)}
    for (attempt, step), taken in audit_of_attempts(run.path).items():
        if taken.ranks == ranks[attempt]:
            assert (taken.keys, taken.rejected) == (expected[step].keys, expected[step].rejected), (
                attempt,
                step,
            )
            complete.add(step)
        else:
            assert set(taken.keys) <= set(expected[step].keys), (attempt, step)
    assert complete == set(expected)


def nothing_lost(run: RunDir) -> None:
    """Every attempt begins at the newest checkpoint that was complete before it."""
    saved = 0
    for event in run.ledger.read().events:
        if isinstance(event, CheckpointSaved):
            saved = event.step
        elif isinstance(event, TrainingBegan):
            assert event.step in (saved, saved + EVERY), event  # one more: killed between rename and ledger
            saved = event.step


def last_loss(run: RunDir) -> float:
    last = run.ledger.read().of(Evaluated)[-1]
    assert last.step == STEPS
    return float(last.metrics["validation/loss"])


def tidy(run: RunDir) -> None:
    """What is left is what the retention keeps, whole, and nothing else."""
    kept = checkpoint.find(run.checkpoints)
    assert {folder.name for folder in run.checkpoints.iterdir()} == {folder.name for folder in kept}
    assert 2 <= len(kept) <= 3 and not list(
        itertools.chain.from_iterable(Reader(folder).verify() for folder in kept)
    )
    assert not list(run.leases.iterdir())
    assert not [path for path in run.path.rglob("*") if "tmp" in path.name]
    json.loads((kept[0] / "manifest.json").read_text(encoding="utf-8"))
