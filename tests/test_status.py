"""`launch status` tells how every attempt ended and where the time went; the curves go on over restarts as if
there had been none."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.run.causes import Cause
from configs.run.events import (
    AttemptBegan,
    ChainEnded,
    CheckpointSaved,
    Ended,
    Event,
    Preflight,
    Progress,
    SlowSave,
    Spike,
    Submitted,
    TrainingBegan,
)
from configs.run.folder import RunDir
from configs.run.goodput import AttemptSummary, Clock, Phase, begin, goodput, summarize
from configs.run.lease import claim
from configs.run.ledger import History
from launch.status import look
from slurm.cluster import QueuedJob
from tests.forks import Kill, Launcher
from tests.making import config_values, run_program

STEPS = 9


def attempt(at: float, number: int, job: str = "") -> AttemptBegan:
    return AttemptBegan(time=at, attempt=number, job=job, chain="71", nodes=["n1", "n2"], ranks=4)


def start(at: float, number: int, step: int) -> TrainingBegan:
    return TrainingBegan(
        time=at, attempt=number, step=step, total_steps=100, global_size=8, ranks=4, device="cpu"
    )


def progress(at: float, number: int, step: int, **seconds: float) -> Progress:
    timed = {
        "start_up": 10.0,
        "first_step": 5.0,
        "data_wait": 2.0,
        "training": 40.0,
        "evaluation": 3.0,
        "saving": 1.0,
        **seconds,
    }
    return Progress(time=at, attempt=number, step=step, samples_per_second=4.0, seconds=timed)


def checkpoint(at: float, number: int, step: int) -> CheckpointSaved:
    return CheckpointSaved(
        time=at,
        attempt=number,
        step=step,
        reason="interval",
        folder=f"step-{step:08d}",
        blocking_seconds=0.0,
        total_seconds=1.0,
        bytes=1,
    )


def ended(at: float, number: int, cause: Cause, words: str) -> Ended:
    return Ended(time=at + 50, attempt=number, cause=cause, words=words, at=at)


# Submitted at 0, in the queue until 100; at work until 170, with 21 steps, of which 16 are saved; again from
# 200 on.
PREEMPTED = [
    Submitted(time=0.0, attempt=0, job="71", nodes="2", tasks_per_node=2),
    attempt(100.0, 0, "71"),
    start(110.0, 0, 0),
    checkpoint(150.0, 0, 16),
    progress(161.0, 0, 21),
    ended(170.0, 0, Cause.PREEMPTED, "preempted: before it could save"),
    attempt(200.0, 1, "72"),
    start(210.0, 1, 16),
    progress(261.0, 1, 26),
]


def write(folder: Path, events: list[Event], torn: str = "") -> RunDir:
    run = RunDir(folder / "run")
    for event in events:
        run.ledger.record(event)
    if torn:
        (run.ledger.folder / "another.jsonl").write_text(torn, encoding="utf-8")
    return run


def attempts(events: list[Event], until: float) -> list[AttemptSummary]:
    return summarize(History(events), until)


def spent(events: list[Event], until: float) -> dict[str, float]:
    return goodput(attempts(events, until), begin(History(events)) or 0.0, until)


def test_the_shares_add_up_and_lost_steps_count_as_lost() -> None:
    parts = spent(PREEMPTED, 270.0)
    assert sum(parts.values()) == pytest.approx(270)
    assert parts["queue"] == 100 + 30
    assert (
        parts["start_up"] == 20
        and parts["first_step"] == 10
        and parts["evaluation"] == 6
        and parts["saving"] == 2
    )
    # 5 of 20 steps after the first, and what came after its last word
    assert parts["lost"] == pytest.approx((40 + 2) * 5 / 20 + 9)
    assert parts["training"] == pytest.approx(40 * 15 / 20 + 40)
    assert parts["other"] == pytest.approx(270 - 261)
    first, second = attempts(PREEMPTED, 270.0)
    assert (first.first, first.last, first.repeated, first.end) == (0, 21, 5, 170) and (
        second.repeated,
        second.end,
    ) == (0, None)


def test_what_a_later_attempt_went_on_from_is_what_was_kept() -> None:
    """The newest checkpoint was damaged, and the one before is used: more is lost than the ledger's saves
    say."""
    lines = [*PREEMPTED[:6], attempt(200.0, 1), start(210.0, 1, 8), progress(261.0, 1, 26)]
    assert [row.repeated for row in attempts(lines, 270.0)] == [13, 0]
    lines += [ended(262.0, 1, Cause.CRASH, "crash"), attempt(270.0, 2)]
    assert [row.repeated for row in attempts(lines, 280.0)] == [13, 26 - 16, 0]
    assert sum(spent(lines, 280.0).values()) == pytest.approx(280)


def test_a_failure_before_the_first_step_is_start_up() -> None:
    lines = [attempt(0.0, 0), ended(30.0, 0, Cause.ERROR, "error: rank 0: no such file"), attempt(40.0, 1)]
    assert {name: value for name, value in spent(lines, 45.0).items() if value} == {
        "queue": 10,
        "start_up": 35,
    }


def test_a_ledger_without_progress_and_with_unknown_and_torn_lines(tmp_path: Path) -> None:
    """What can be read counts; what cannot is told."""
    events = [event for event in PREEMPTED if not isinstance(event, Progress)]
    torn = '{"time": 1.0, "event": "weather", "attempt": 0}\n{"time": 260.0, "event": "prog'
    run = write(tmp_path, events, torn)
    report = look(run, [QueuedJob("72", "RUNNING", "n[1-2]", "None")], 270.0)
    assert report.notices == [report.notices[0]] and report.notices[0].startswith("2 lines of the ledger")
    told = summarize(run.ledger.read(), 270.0)
    assert [(row.first, row.last, row.samples_per_second) for row in told] == [(0, 16, None), (16, 16, None)]
    parts = goodput(told, 0.0, 270.0)
    assert sum(parts.values()) == pytest.approx(270) and parts["start_up"] == 20 and parts["other"] == 60 + 60


def test_the_clock_counts_the_first_step_apart_and_the_speed_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "time", lambda: now)
    clock = Clock(began=90.0)
    for phase, seconds in [
        (Phase.EVALUATION, 4),
        (Phase.DATA_WAIT, 1),
        (Phase.TRAINING, 20),
        (None, 0),
        (Phase.DATA_WAIT, 1),
        (Phase.TRAINING, 3),
        (None, 0),
        (Phase.SAVING, 2),
    ]:
        if phase is None:
            clock.step()
        else:
            clock.enter(phase)
        now += seconds
    told = clock.progress(attempt=0, step=2, global_size=12)
    assert told.seconds == {
        "start_up": 10,
        "first_step": 20,
        "data_wait": 2,
        "training": 3,
        "evaluation": 4,
        "saving": 2,
    }
    assert told.samples_per_second == 12 / 6


def pending(job: str, reason: str) -> QueuedJob:
    return QueuedJob(job, "PENDING", "", reason)


@pytest.mark.parametrize(
    ("jobs", "state", "words"),
    [
        ([QueuedJob("72", "RUNNING", "n[1-2]", "None")], "running", "job 72, 2 nodes x 2, on n1, n2"),
        ([pending("72", "Resources")], "waiting", "job 72: Resources"),  # requeued
        (
            [QueuedJob("72", "COMPLETED", "n[1-2]", "None"), pending("99", "Resources")],
            "running",
            "job 72",
        ),  # another run's
        ([], "ended", "unknown: job 72, state not known"),  # scancel: nobody is left to tell
        (None, "unknown", "Slurm does not answer here"),
    ],
)
def test_the_state_is_what_slurm_says(
    tmp_path: Path, jobs: list[QueuedJob] | None, state: str, words: str
) -> None:
    run = write(tmp_path, PREEMPTED)
    report = look(run, jobs, 270.0)
    assert report.state == state and report.words.startswith(words)
    assert report.eta_seconds == (74 * 8 / 4 if state == "running" else None)
    assert report.next == ("python -m launch submit CONFIG" if state == "ended" else "")
    assert sum(part["share"] for part in report.goodput.values()) == pytest.approx(1, abs=1e-4)


def test_without_slurm_signs_of_life_tell(tmp_path: Path) -> None:
    run = write(tmp_path, [])
    claim(run, job="71")
    run.ledger.record(AttemptBegan(attempt=0, job="71", nodes=["n1"], ranks=2))
    report = look(run, None, time.time())
    assert (report.state, report.words) == ("running", "job 71, 1 node x 2, on n1, starting up")


def test_why_a_chain_has_ended(tmp_path: Path) -> None:
    why = "3 attempts failed in a row"
    run = write(
        tmp_path,
        [
            *PREEMPTED,
            ended(262.0, 1, Cause.CRASH, "crash: rank 3"),
            ChainEnded(time=263.0, attempt=1, chain="71", why=why),
        ],
    )
    report = look(run, [], 1e6)
    assert (report.state, report.words) == ("ended", why)
    assert sum(part["seconds"] for part in report.goodput.values()) == pytest.approx(
        262
    )  # what comes after the end does not count


def test_what_should_be_looked_at_is_told(tmp_path: Path) -> None:
    spikes = [Spike(time=255.0 + step, attempt=1, step=step, loss=9.5, keys=["a"]) for step in (18, 19)]
    slow = SlowSave(
        time=255.0,
        attempt=1,
        step=20,
        seconds=95.2,
        grace_seconds=180,
        advice="raise slurm.signal_seconds",
    )
    note = "n2: a GPU does 300 TFLOP/s"
    preflight = Preflight(time=205.0, attempt=1, seconds=2.0, all_reduce_gb_per_second=9.0, notes=[note])
    report = look(write(tmp_path, [*PREEMPTED, preflight, *spikes, slow]), [], 280.0)
    assert report.notices == [
        "step 20: the save took 95 s, and slurm.signal_seconds is 180: raise slurm.signal_seconds",
        "step 19: its loss, 9.5, stands out; the ledger names the samples (the last of 2)",
        note,
    ]


def test_a_run_whose_indexing_failed_says_where_to_look(tmp_path: Path) -> None:
    report = look(write(tmp_path, [replace(PREEMPTED[0], index_log="run/slurm/index-70.log")]), [], 50.0)
    assert (report.state, report.words) == (
        "ended",
        (
            "no job of it is in the queue, and none has begun; was it the indexing? Its log:"
            " run/slurm/index-70.log"
        ),
    )


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory, model: Path, shards: str, launch: Launcher) -> RunDir:
    """Killed before it has saved, killed with its launcher after it has, stopped right after an evaluation,
    and finished."""
    folder = tmp_path_factory.mktemp("restarted")
    (folder / "runs").mkdir()
    values = config_values(
        "small",
        folder / "runs",
        model,
        shards,
        optim={"max_steps": STEPS},
        checkpoint={"every_steps": 4},
        engine={"backend": "fsdp2"},
        batch={"global_size": 2, "micro_seconds": 1},
        evaluate={"every_steps": 3, "captions": 0, "max_samples": 2, "best_metric": "validation/empty_rate"},
    )
    kills = [
        (Kill("trainer.loop:learning_rate", 3, rank=0), 1),
        (Kill("trainer.loop:learning_rate", 8), -9),
        (Kill("trainer.loop:Training.evaluate", 1, after=True, rank=0, signum=signal.SIGTERM), 85),
        (None, 0),
    ]
    for kill, code in kills:
        done = launch(values, procs=2, kill=kill)
        assert done.returncode == code, done.stderr
    return RunDir(folder / "runs/small")


def status(run: RunDir, *arguments: object) -> str:
    """What the command prints, in the folder that has `runs/`."""
    done = run_program("launch", "status", *arguments, cwd=run.path.parents[1])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_status_shows_every_attempt_and_writes_nothing(restarted: RunDir) -> None:
    before = {path: path.stat().st_mtime_ns for path in restarted.path.rglob("*")}
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        said = status(restarted, "runs/small")
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 1, seconds
    assert before == {path: path.stat().st_mtime_ns for path in restarted.path.rglob("*")}
    for words in (
        "crash: rank 0 was killed by SIGKILL",
        "unknown: no word of it, as after a kill",
        "asked to save: saved at step 6",
        "step 9 of 9",
    ):
        assert words in said
    assert "next: python -m tools.export runs/small captioner" in said


def test_status_as_json(restarted: RunDir) -> None:
    report = json.loads(status(restarted, "runs/small", "--json"))
    rows = [AttemptSummary(**row) for row in report["attempts"]]
    assert [(row.first, row.last, row.cause) for row in rows][2:] == [(4, 6, "saved"), (6, 9, "finished")]
    assert (
        rows[0].first == rows[1].first == 0
        and rows[0].repeated == rows[0].last
        and (report["state"], report["step"], report["steps"]) == ("finished", 9, 9)
    )
    last = rows[-1].end
    assert last is not None and sum(part["seconds"] for part in report["goodput"].values()) == pytest.approx(
        last - report["since"], abs=0.1
    )
    assert report["goodput"]["lost"]["seconds"] > 0 and report["goodput"]["training"]["seconds"] > 0
    assert json.loads(status(restarted, "--json")) == [report]


def test_status_of_all_runs(restarted: RunDir) -> None:
    header, line = status(restarted).strip().splitlines()
    assert header.split()[:3] == ["run", "state", "step"] and line.split()[:5] == [
        "runs/small",
        "finished",
        "9",
        "of",
        "9",
    ]


def test_the_ledger_is_told_at_the_first_step_and_at_the_end_and_seldom_between(restarted: RunDir) -> None:
    assert [line.attempt for line in restarted.ledger.read().of(Progress)] == [0, 1, 2, 2, 3, 3]


def test_curves_have_every_step_once_and_restarts_are_marked(restarted: RunDir) -> None:
    events = EventAccumulator(str(restarted.tensorboard), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    for name in ("loss", "loss/sounds", "grad_norm", "attempt"):
        assert [point.step for point in events.Scalars(name)] == list(range(1, STEPS + 1)), name
    assert [point.step for point in events.Scalars("validation/loss")] == [0, 3, 6, 9]
    assert [point.value for point in events.Scalars("attempt")] == [1, 1, 1, 1, 2, 2, 3, 3, 3]
    marks = {
        point.tensor_proto.string_val[0].decode(): point.step
        for point in events.Tensors("restarts/text_summary")
    }
    assert list(marks.values())[-3:] == [0, 4, 6]
    assert list(marks)[-3:] == [
        "attempt 1, 1 node x 2, resumed at step 0 after: crash: rank 0 was killed by SIGKILL",
        "attempt 2, 1 node x 2, resumed at step 4 after: unknown: no word of it, as after a kill",
        "attempt 3, 1 node x 2, resumed at step 6 after: asked to save: saved at step 6",
    ]
    shares = {
        name: {point.step: point.value for point in events.Scalars(name)}
        for name in events.Tags()["scalars"]
        if name.startswith("goodput/")
    }
    steps = sorted(shares["goodput/training"])
    assert (
        {"goodput/queue", "goodput/lost"} < set(shares) and steps == sorted(set(steps)) and steps[-1] == STEPS
    )
    assert all(
        sum(values[step] for values in shares.values()) == pytest.approx(1, abs=1e-5) for step in steps
    )
