"""What a run tells is kept whoever writes it, and what cannot be read is told."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from configs.errors import ConfigError, ExitCode
from configs.run.causes import Cause
from configs.run.ends import Failure, Outside, find_end, rank_errors
from configs.run.events import (
    KINDS,
    AttemptBegan,
    CheckpointSaved,
    Event,
    Hung,
    Progress,
    RankFailed,
    SourceSamples,
    TrainingEnded,
    parse,
)
from configs.run.files import JsonLines
from configs.run.folder import RunDir
from tests.making import run_program

LINES = 200


def began(attempt: int = 0, job: str = "") -> AttemptBegan:
    return AttemptBegan(attempt=attempt, ranks=2, nodes=["n1", "n2"], job=job)


def stale_append(descriptor: int, content: bytes) -> int:
    """As a client of NFS appends: at the end of the file as it knew it a moment ago."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    os.sched_yield()
    return os.pwrite(descriptor, content, end)


def write_lines(folder: Path, writer: int) -> None:
    """One of several processes, on a file system that seeks, then writes."""
    real_open = os.open
    os.open = lambda path, flags, mode=0o777: real_open(path, flags & ~os.O_APPEND, mode)
    os.write = stale_append
    journal = JsonLines(folder)
    for number in range(LINES):
        journal.append({"writer": writer, "number": number, "text": "ü" * (number % 50)})


def test_writers_lose_nothing_where_appending_is_not_atomic(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_lines, args=(tmp_path, writer)) for writer in range(3)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    lines = JsonLines(tmp_path).read()
    assert not lines.torn
    expected = [(writer, number) for writer in range(3) for number in range(LINES)]
    assert sorted((line["writer"], line["number"]) for line in lines.values) == expected


def test_every_event_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    values = {
        "int": 3, "str": "é\n", "float": 0.5, "list[str]": ["a"], "list[int]": [1], "list[float]": [0.5],
        "dict[str, float]": {"validation/loss": 1.5}, "float | None": None, "Cause": Cause.CRASH,
        "tuple[int, int]": (3, 1), "list[dict[str, str]]": [{"key": "k"}],
        "list[SourceSamples]": [SourceSamples("sounds", 9, 4, 3, 2, 0)],
    }  # fmt: skip
    run = RunDir(tmp_path)
    events: list[Event] = []
    for kind in KINDS.values():
        fields = {name: values[str(field.type)] for name, field in kind.__dataclass_fields__.items()
                  if name not in ("time", "name")}  # fmt: skip
        events.append(kind(**fields))
        run.ledger.record(events[-1])
    assert len(events) > 20
    history = run.ledger.read()
    assert sorted(history.events, key=lambda event: event.name) == sorted(events, key=lambda e: e.name)
    assert not history.unreadable


def test_events_are_ordered_by_attempt_and_then_by_time(tmp_path: Path) -> None:
    """The clock of the second attempt's node is a day behind."""
    run = RunDir(tmp_path)
    for attempt, time in ((1, 5.0), (0, 86_400.0), (1, 6.0), (0, 86_401.0)):
        event = Progress(time=time, attempt=attempt, step=1, samples_per_second=None, seconds={})
        run.ledger.record(event)
    order = [(event.attempt, event.time) for event in run.ledger.read().events]
    assert order == [(0, 86_400.0), (0, 86_401.0), (1, 5.0), (1, 6.0)]


def test_a_line_that_was_cut_off_is_told_and_loses_that_line_alone(tmp_path: Path) -> None:
    """As by a full disk, in the middle of a letter; what the same process writes afterwards is whole."""
    run = RunDir(tmp_path)
    run.ledger.record(began(3))
    (file,) = run.ledger.folder.iterdir()
    with file.open("ab") as content:
        content.write(b'{"event": "evaluation", "caption": "caf\xc3')
    run.ledger.record(began(4))
    history = run.ledger.read()
    assert [event.attempt for event in history.of(AttemptBegan)] == [3, 4] and history.next_attempt == 5
    assert history.unreadable == [f"{file}:2"]
    done = run_program("launch", "status", run.path, "--events")
    assert [json.loads(line)["attempt"] for line in done.stdout.splitlines()] == [3, 4]
    assert (
        f"1 line of the ledger cannot be read (a full disk, a power cut, or another version), e.g. {file}:2"
        in (done.stderr)
    )
    assert "notice: 1 line of the ledger cannot be read" in run_program("launch", "status", run.path).stdout


@pytest.mark.parametrize(
    "line", [{}, {"event": "weather", "attempt": 1}, {"event": "start", "attempt": 1, "step": "many"}]
)
def test_a_line_that_is_no_event_is_refused(line: dict) -> None:
    with pytest.raises(ValueError):
        parse(line)


def test_a_run_of_an_earlier_version_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"model.init_from={tmp_path}"):
        RunDir(tmp_path).ledger.read()


def error(rank: int, cause: Cause, message: str, at: float = 1.0, exit_code: int = 1) -> RankFailed:
    return RankFailed(
        time=at, attempt=0, rank=rank, node=f"n{rank}", cause=cause, exit_code=exit_code, message=message
    )


LOST = error(0, Cause.LOST_PEER, "Traceback ...\nRuntimeError: Connection closed by peer", at=1.0)
BUG = error(1, Cause.ERROR, "Traceback ...\nZeroDivisionError: division by zero", at=2.0)
SAVED = TrainingEnded(attempt=0, step=8, outcome="saved", signal="SIGTERM")
TRAINED = Progress(attempt=0, step=1, samples_per_second=None, seconds={})
KILLED = Failure(Cause.CRASH, "rank 1 on n2: Killed", "n2", by_signal=True, rank=1)


@pytest.mark.parametrize(
    ("events", "outside", "cause", "words", "node"),
    [
        ([TrainingEnded(attempt=0, step=9, outcome="finished")], Outside(), Cause.FINISHED, "finished", ""),
        ([SAVED], Outside(), Cause.SAVED, "asked to save: saved at step 8", ""),
        ([SAVED], Outside(job_cause=Cause.PREEMPTED), Cause.PREEMPTED, "preempted: saved at step 8", ""),
        ([SAVED], Outside(stop_asked=True), Cause.STOPPED, "stopped by `launch stop`", ""),
        # An error is never hidden by a stop.
        ([SAVED, BUG], Outside(), Cause.ERROR, "error: rank 1: ZeroDivisionError: division by zero", "n1"),
        ([SAVED, LOST], Outside(), Cause.SAVED, "asked to save: saved at step 8", ""),
        # Who has only lost another one is not the cause, whenever it spoke.
        ([LOST, BUG], Outside(), Cause.ERROR, "error: rank 1: ZeroDivisionError: division by zero", "n1"),
        ([LOST], Outside(failure=KILLED), Cause.CRASH, "crash: rank 1 on n2: Killed", "n2"),
        ([LOST], Outside(), Cause.ERROR, "error: rank 0: RuntimeError: Connection closed by peer", "n0"),
        # Values decide, not sentences.
        (
            [error(0, Cause.ERROR, "there is too little memory, Superseded, NCCL")],
            Outside(),
            Cause.ERROR,
            "error: rank 0: there is too little memory, Superseded, NCCL",
            "n0",
        ),
        (
            [error(0, Cause.OUT_OF_MEMORY, "no room")],
            Outside(),
            Cause.OUT_OF_MEMORY,
            "out of memory: rank 0: no room",
            "n0",
        ),
        ([error(0, Cause.SUPERSEDED, "by 3")], Outside(), Cause.SUPERSEDED, "superseded: by 3", ""),
        ([error(0, Cause.UNFIT_NODE, "a disk")], Outside(), Cause.UNFIT_NODE, "unfit node: a disk", "n0"),
        (
            [error(0, Cause.BAD_INPUT, "no key", exit_code=ExitCode.DATA)],
            Outside(),
            Cause.BAD_INPUT,
            "bad config or data: no key",
            "",
        ),
        # Keys that have expired: the next attempt reads them anew.
        (
            [TRAINED, error(0, Cause.BAD_INPUT, "no key", exit_code=ExitCode.DATA)],
            Outside(),
            Cause.ERROR,
            "error: rank 0: no key",
            "n0",
        ),
        # What was read stays as it is.
        (
            [TRAINED, error(0, Cause.UNUSABLE_DATA, "no caption", exit_code=ExitCode.DATA)],
            Outside(),
            Cause.BAD_INPUT,
            "bad config or data: no caption",
            "",
        ),
        (
            [Hung(attempt=0, words="rank 1 is stuck", node="n2", suspects=[1]), LOST],
            Outside(),
            Cause.HANG,
            "hang: rank 1 is stuck",
            "n2",
        ),
        ([], Outside(exit_code=9), Cause.UNKNOWN, "unknown: no word of it, as after a kill, exit code 9", ""),
    ],
)  # fmt: skip
def test_how_an_attempt_ended_is_decided_on_values(
    tmp_path: Path, events: list[Event], outside: Outside, cause: Cause, words: str, node: str
) -> None:
    run = RunDir(tmp_path)
    for event in [began(), *events]:
        run.ledger.record(event)
    end = find_end(run, run.ledger.read(), 0, outside)
    assert (end.cause, end.words, end.node) == (cause, words, node)


def test_who_knows_why_it_fails_is_told_before_who_has_only_lost_it(tmp_path: Path) -> None:
    """Whoever wrote first: the launcher prints the first of them."""
    run = RunDir(tmp_path)
    for event in (LOST, BUG):
        run.ledger.record(event)
    assert rank_errors(run.ledger.read(), 0) == [BUG, LOST]


def test_the_newest_checkpoint_is_that_of_the_last_attempt(tmp_path: Path) -> None:
    """It went on from an earlier one: the newest was damaged."""
    run = RunDir(tmp_path)
    for attempt, step, time in ((0, 20, 9e9), (1, 12, 5.0)):
        run.ledger.record(
            CheckpointSaved(time=time, attempt=attempt, step=step, reason="interval", folder="", bytes=1,
                            blocking_seconds=0.0, total_seconds=1.0)
        )  # fmt: skip
    assert run.ledger.read().saved_step == 12
