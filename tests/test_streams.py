"""A program does what it does whoever listens: nobody, somebody who leaves, or somebody who does not read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slurm.signals import StopFlag
from tests.making import ROOT

TRAINING = """
from configs.streams import open_streams
open_streams(unheeded=True)
import sys
for number in range(20_000):
    print("step", number, "of a run", flush=number % 100 == 0)
print("a word on stderr", file=sys.stderr)
open(sys.argv[1], "w").write("done")
raise SystemExit(85)
"""
COMMAND = """
from configs.errors import run_command
run_command(lambda: [print("line", number) for number in range(20_000)])
"""


@contextmanager
def left() -> Iterator[int]:
    """A pipe whose reader has left."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@contextmanager
def stalled() -> Iterator[int]:
    """A pipe that nobody reads, as of a pager that waits for a key."""
    read, write = os.pipe()
    yield write
    os.close(read)
    os.close(write)


@contextmanager
def stopped_terminal() -> Iterator[int]:
    """A terminal that is not read, as of a connection that has died."""
    master, terminal = os.openpty()
    yield terminal
    os.close(master)
    os.close(terminal)


@contextmanager
def lost_terminal() -> Iterator[int]:
    """A terminal whose window was closed."""
    master, terminal = os.openpty()
    os.close(master)
    yield terminal
    os.close(terminal)


@contextmanager
def full() -> Iterator[int]:
    """A file on a full disk."""
    with Path("/dev/full").open("wb") as file:
        yield file.fileno()


@contextmanager
def closed() -> Iterator[int]:
    """No output at all (`>&-`)."""
    yield -1


def run(program: str, output: int, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    """Run a program whose output goes there; with -1 it has none, and no input either."""

    def close() -> None:
        for descriptor in (0, 1, 2):
            os.close(descriptor)

    is_closed = output == -1
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        stdout=None if is_closed else output,
        stderr=None if is_closed else subprocess.PIPE,
        preexec_fn=close if is_closed else None,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("listener", [left, stalled, stopped_terminal, lost_terminal, full, closed])
def test_training_goes_on_to_its_own_exit_code_whoever_listens(
    tmp_path: Path, listener: Callable[[], Iterator[int]]
) -> None:
    with listener() as output:
        done = run(TRAINING, output, tmp_path / "result")
    assert done.returncode == 85
    assert done.stderr in (None, b"a word on stderr\n")
    assert (tmp_path / "result").read_text(encoding="utf-8") == "done", "no print went into the file"


def test_other_commands_end_quietly_when_their_reader_leaves() -> None:
    with left() as output:
        done = run(COMMAND, output)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_other_commands_say_that_their_output_could_not_be_written() -> None:
    with full() as output:
        done = run(COMMAND, output)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: /dev/full: No space left on device: make room there")


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_goes_away_asks_to_save_unless_nohup_was_told(ignored: bool) -> None:
    signals = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {signum: signal.getsignal(signum) for signum in signals}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        stop = StopFlag().install()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.name == ("" if ignored else "SIGHUP")
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
