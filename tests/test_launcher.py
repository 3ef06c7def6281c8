"""What the launcher does with the signals that it gets, and what it says at the end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import ExitCode
from configs.run.causes import Cause
from configs.run.events import CheckpointSaved
from configs.run.folder import RunDir
from launch import local, worker
from slurm.chain import record_end
from tests.test_lease import until

SAVES = "trap 'exit 85' TERM; >listens; while :; do sleep .02; done"
"""A rank that is asked to save."""
NEVER_SAVES = "trap '' TERM; >listens; while :; do sleep .02; done"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    signals = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {signum: signal.getsignal(signum) for signum in signals}
    yield RunDir(tmp_path / "run")
    for signum, handler in before.items():
        signal.signal(signum, handler)


def attempt(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, rank: str, *signals: signal.Signals
) -> tuple[int, Cause | None]:
    """An attempt whose rank is a shell program, and whose launcher gets signals. Returns its exit code, and
    the cause in the ledger, if it was left at once."""

    def start(*_: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sh", "-c", rank], start_new_session=True, cwd=run.path)

    asked = threading.Event()
    not_ours = signal.getsignal(signals[0])

    def send() -> None:
        until(lambda: (run.path / "listens").exists() and signal.getsignal(signals[0]) is not not_ours)
        for signum in signals:
            os.kill(os.getpid(), signum)
            until(asked.is_set)

    monkeypatch.setattr(local, "_start", start)
    sender = threading.Thread(target=send)
    sender.start()
    code, failure = local._attempt(run, 0, 1, asked)
    sender.join()
    return code, record_end(run, 0, code, failure).cause if failure else None


@pytest.mark.parametrize(
    "signum", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
)
def test_a_terminal_that_is_closed_asks_the_ranks_to_save_as_ctrl_c_does(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], signum: signal.Signals
) -> None:
    assert attempt(run, monkeypatch, SAVES, signum) == (ExitCode.SAVED, None)
    assert (
        "stopping: saving at the end of this step (Ctrl-C again to leave at once)" in capfd.readouterr().err
    )


def test_ctrl_c_twice_says_what_is_lost(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run.ledger.record(
        CheckpointSaved(
            attempt=0,
            step=12,
            reason="interval",
            folder="step-00000012",
            blocking_seconds=0.0,
            total_seconds=0.0,
            bytes=1,
            metrics={},
        )
    )
    done = attempt(run, monkeypatch, NEVER_SAVES, signal.SIGINT, signal.SIGINT)
    assert done == (1, Cause.CANCELLED)
    said = capfd.readouterr().err
    assert "left at once, not saved; the newest checkpoint is of step 12" in said
    assert "SIGKILL" not in said and "want of memory" not in said


def test_the_launcher_shows_what_a_rank_could_write_nowhere(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def start(*arguments: object) -> subprocess.Popen[bytes]:
        """A rank fails while the ledger cannot be written."""
        last_words = arguments[-1]
        assert isinstance(last_words, local.LastWords)
        with monkeypatch.context() as patched:
            for name, value in last_words.environment.items():
                patched.setenv(name, value)
            away = run.ledger.folder.rename(run.path / "away")
            run.ledger.folder.touch()
            worker._report(run, 0, 0, OSError(errno.ENOSPC, "full", str(run.path / "audit/a.jsonl")))
            run.ledger.folder.unlink()
            away.rename(run.ledger.folder)
        return subprocess.Popen(["false"])

    monkeypatch.setattr(local, "_start", start)
    code, failure = local._attempt(run, 0, 1, threading.Event())
    assert code == 1 and failure is not None and "audit/a.jsonl: No space left on device" in failure.words
    assert f"{run.path}/audit/a.jsonl: No space left on device: make room there" in capfd.readouterr().err
