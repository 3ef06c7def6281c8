"""Of two attempts at one run, one at most writes; a dead one holds nobody up for long, and nobody has to
delete a file by hand."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.errors import ConfigError, ExitCode
from configs.run import lease
from configs.run.events import AttemptBegan, CheckpointSaved, TrainingBegan
from configs.run.folder import RunDir
from configs.run.lease import EXPIRES, Lease, Superseded, claim, holder
from tests.forks import Launcher
from tests.making import ROOT, audit, config_values, run_program

CLAIM = (
    "import sys; from configs.run.lease import claim; from configs.run.folder import RunDir;"
    " claim(RunDir(sys.argv[1])); print('claimed', flush=True); sys.stdin.read()"
)
"""A program that takes a run, and then dies without a word when its input ends."""


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.fixture
def other(run: RunDir) -> Iterator[subprocess.Popen[str]]:
    """A process that is at work on the run."""
    with subprocess.Popen(
        [sys.executable, "-c", CLAIM, run.path],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stdout and process.stdout.readline() == "claimed\n"
        yield process
        process.kill()


def elsewhere(run: RunDir, attempt: int, *, silent_for: float, **about: object) -> Path:
    """The lease file of an attempt on another machine; a process of that number happens to live here, too."""
    run.leases.mkdir(parents=True, exist_ok=True)
    file = run.leases / f"attempt-{attempt:06d}.json"
    file.write_text(
        json.dumps(
            {
                "attempt": attempt,
                "job": "4711",
                "host": "node7",
                "pid": os.getpid(),
                "system": "another",
                "seconds": 0.0,
                **about,
            }
        ),
        encoding="utf-8",
    )
    set_back(file, silent_for)
    return file


def set_back(file: Path, seconds: float) -> None:
    os.utime(file, (time.time() - seconds,) * 2)


def test_a_second_start_is_refused_with_who_is_at_work_and_touches_nothing(
    tmp_path: Path, model: Path, shards: str, run: RunDir, other
) -> None:
    run.config.write_text("as it was", encoding="utf-8")
    run.ledger.record(AttemptBegan(attempt=0, ranks=1, nodes=["n1"]))
    before = {
        file: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.path.rglob("*") if file.is_file()
    }
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(config_values("run", tmp_path, model, shards)), encoding="utf-8"
    )
    done = run_program("launch", "train", tmp_path / "mine.yaml")
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert re.search(
        rf"run: attempt 0 is at work here \(host \S+, process {other.pid}\), and gave a sign of life \d+ s"
        r" ago\.",
        done.stderr,
    )
    assert (
        "Stop it there first" in done.stderr
        and "another run.name" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert before == {
        file: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.path.rglob("*") if file.is_file()
    }


def test_the_run_of_a_process_that_died_here_is_taken_at_once(run: RunDir, other) -> None:
    other.kill()
    other.wait()
    assert claim(run).attempt == 1
    assert [file.name for file in run.leases.iterdir()] == ["attempt-000001.json"]


def test_an_attempt_elsewhere_counts_as_dead_when_it_has_been_silent_long_enough(run: RunDir) -> None:
    file = elsewhere(run, 3, silent_for=EXPIRES - 20)
    with pytest.raises(ConfigError, match=r"attempt 3 is at work here \(host node7, job 4711\)") as refused:
        claim(run)
    (seconds,) = re.findall(r"start again in (\d+) s", str(refused.value))
    assert 15 <= int(seconds) <= 20
    set_back(file, EXPIRES + 1)
    assert claim(run).attempt == 4
    assert not file.exists()


def test_a_later_attempt_may_take_over_a_live_one_which_learns_of_it(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 0.01)
    first = claim(run).keep()
    (file,) = run.leases.iterdir()
    set_back(file, EXPIRES / 2)
    until(lambda: (now := holder(run)) and now.seconds < 1)  # it gives signs of life
    first.check()
    second = claim(run, job="4712", supersede=True)
    until(lambda: first.lost)
    with pytest.raises(
        Superseded,
        match=r"attempt 1 \(host \S+, job 4712\) has taken over this run; attempt 0 leaves without saving",
    ):
        first.check()
    second.check()
    assert not second.lost


def together(claims: int, action: Callable[[], Lease]) -> list[Lease | ConfigError]:
    """What several who begin at the same moment get."""
    start = threading.Barrier(claims)

    def one(_: int) -> Lease | ConfigError:
        start.wait()
        try:
            return action()
        except ConfigError as refused:
            return refused

    with ThreadPoolExecutor(claims) as pool:
        return list(pool.map(one, range(claims)))


def alive(one: Lease) -> bool:
    try:
        one.check()
    except Superseded:
        return False
    return True


@pytest.mark.parametrize("before", ["nobody", "a dead attempt"])
def test_of_many_who_start_at_once_one_gets_the_run(tmp_path: Path, before: str) -> None:
    for turn in range(40):
        run = RunDir(tmp_path / str(turn))
        if before == "a dead attempt":
            elsewhere(run, 2, silent_for=EXPIRES + 1)
        got = [one for one in together(8, lambda run=run: claim(run)) if isinstance(one, Lease)]
        assert [one.attempt for one in got] == [3 if before == "a dead attempt" else 0]
        got[0].check()


def test_of_many_who_take_over_at_once_the_last_one_is_left(tmp_path: Path) -> None:
    for turn in range(40):
        run = RunDir(tmp_path / str(turn))
        elsewhere(run, 2, silent_for=0)
        got = [
            one for one in together(8, lambda run=run: claim(run, supersede=True)) if isinstance(one, Lease)
        ]
        numbers = [one.attempt for one in got]
        assert len(set(numbers)) == 8 and min(numbers) > 2, numbers
        assert [one.attempt for one in got if alive(one)] == [max(numbers)]
        assert len(list(run.leases.iterdir())) == 1


def test_who_was_held_up_while_taking_over_does_not_write_beside_a_later_one(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two others take the run over between the look at who holds it and the claim."""
    claim(run)
    others: list[Lease] = []
    create = lease._create

    def late(file: Path, text: str) -> bool:
        monkeypatch.setattr(lease, "_create", create)
        others.extend(claim(run, supersede=True) for _ in range(2))
        return create(file, text)

    monkeypatch.setattr(lease, "_create", late)
    mine = claim(run, supersede=True)
    assert mine.attempt > max(one.attempt for one in others)
    assert [alive(one) for one in (*others, mine)] == [False, False, True]


def test_a_number_is_not_given_twice(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attempt begins and ends between the look at who holds the run and the claim."""
    create = lease._create

    def late(file: Path, text: str) -> bool:
        monkeypatch.setattr(lease, "_create", create)
        first = claim(run)
        run.ledger.record(AttemptBegan(attempt=first.attempt, ranks=1, nodes=["n1"]))
        first.release()
        return create(file, text)

    monkeypatch.setattr(lease, "_create", late)
    assert claim(run).attempt == 1
    assert [file.name for file in run.leases.iterdir()] == ["attempt-000001.json"]


def test_a_run_that_was_left_can_be_started_at_once(run: RunDir) -> None:
    first = claim(run)
    run.ledger.record(AttemptBegan(attempt=first.attempt, ranks=1, nodes=["n1"]))
    first.release()
    assert holder(run) is None
    assert claim(run).attempt == 1


@pytest.mark.parametrize("content", ["", '{"attempt": 5, "jo', "[]", '{"attempt": 5}', "\x00" * 100])
def test_a_damaged_lease_file_holds_a_run_up_no_longer_than_a_dead_attempt(run: RunDir, content: str) -> None:
    file = elsewhere(run, 5, silent_for=0)
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"attempt 5 is at work here .*start again in \d+ s"):
        claim(run)
    set_back(file, EXPIRES + 1)
    assert claim(run).attempt == 6
    assert not file.exists()


def test_a_damaged_lease_file_can_be_taken_over(run: RunDir) -> None:
    elsewhere(run, 5, silent_for=0).write_text("", encoding="utf-8")
    assert claim(run, supersede=True).attempt == 6


def checkpoints(run: RunDir) -> list[str]:
    return sorted(folder.parent.name for folder in run.checkpoints.glob("step-????????/manifest.json"))


def test_a_running_training_that_is_taken_over_leaves_without_saving_and_the_later_attempt_goes_on(
    tmp_path: Path, model: Path, shards: str, run: RunDir, launch: Launcher
) -> None:
    values = config_values(
        "run",
        tmp_path,
        model,
        shards,
        engine={"backend": "fsdp2"},
        optim={"max_steps": 100_000},
        checkpoint={"every_steps": 10},
        evaluate={"captions": 0, "max_samples": 1},
        monitor={"every_steps": 100},
    )
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(launch, values, procs=2)
        until(lambda: run.ledger.read().of(CheckpointSaved))
        later = claim(run, job="4712", supersede=True)
        saved = checkpoints(run)
        done = first.result()
    assert done.returncode == 1
    assert re.search(
        r"attempt 1 \(host \S+, job 4712\) has taken over this run; attempt 0 leaves without saving",
        done.stderr,
    ), done
    assert checkpoints(run) == saved

    step = int(saved[-1].removeprefix("step-"))
    later.release()
    assert (
        launch(
            {**values, "optim": {"lr": 1e-3, "max_steps": step + 3, "warmup_fraction": 0.0}}, procs=2
        ).returncode
        == 0
    )
    (start,) = [line for line in run.ledger.read().of(TrainingBegan) if line.attempt == 1]
    assert start.step == step
    assert checkpoints(run)[-1] == f"step-{step + 3:08d}" and not list(run.checkpoints.glob("*.tmp"))
    assert holder(run) is None  # so that another machine, which cannot see that it is dead, need not wait


def taken_over_in_step_2() -> None:
    """In a rank: another attempt takes the run while rank 0 is about to take step 2, which notices it."""
    from trainer import loop

    check_usable = loop.Training.check_usable

    def checked(training: Any, sums: Any) -> None:
        check_usable(training, sums)
        if training.state.step == 2 and training.world.rank == 0:
            claim(training.session.run, job="4712", supersede=True)
            with contextlib.suppress(Superseded):
                training.session.lease.check()

    loop.Training.check_usable = checked


def test_an_attempt_that_was_taken_over_takes_no_further_step(
    tmp_path: Path, model: Path, shards: str, run: RunDir, launch: Launcher
) -> None:
    """Whether or not it has anything to save soon."""
    values = config_values(
        "run",
        tmp_path,
        model,
        shards,
        engine={"backend": "fsdp2"},
        optim={"max_steps": 9},
        checkpoint={"every_steps": 1000},
        evaluate={"captions": 0, "max_samples": 1},
    )
    done = launch(values, procs=2, before="tests.test_lease:taken_over_in_step_2")
    assert done.returncode == 1 and "has taken over this run" in done.stderr
    assert sorted(audit(run.path)) == [0, 1, 2] and not checkpoints(run)
