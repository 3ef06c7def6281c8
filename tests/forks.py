"""The real launcher and the real ranks without seconds of imports: their processes are forked from one that
has imported everything.

`python -m tests.forks` reads one JSON request per line, and answers with the exit code.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from configs.errors import run_command
from configs.run.folder import RunDir
from data import retry
from launch import local, worker
from launch.__main__ import app
from launch.last_words import LastWords
from tests.making import ROOT

FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Kill:
    """SIGKILL at call number `nth` of a function (`module:attribute`; after it has returned, with `after`),
    or some time after it.

    rank: the victim; None: the whole node, the launcher included. signum: another signal, as SIGTERM, which
    asks to save. content: a segmentation fault instead, in all calls whose first argument holds it. stall:
    seconds that the call takes longer.
    """

    function: str
    nth: int = 1
    after: bool = False
    rank: int | None = None
    delay: float | None = None
    signum: int = signal.SIGKILL
    content: str = ""
    stall: float = 0.0

    def arm(self, rank: int) -> None:
        """Set the trap in this process."""
        if self.rank not in (None, rank):
            return
        module, _, path = self.function.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original, calls = getattr(owner, name), itertools.count(1)

        def trapped(*arguments: Any, **keywords: Any) -> Any:
            due = self.content.encode() in arguments[0] if self.content else next(calls) == self.nth
            if due and self.delay is not None:
                threading.Timer(self.delay, self._strike).start()
            elif due and not self.after:
                self._strike()
            if due:
                time.sleep(self.stall)
            result = original(*arguments, **keywords)
            if due and self.after:
                self._strike()
            return result

        setattr(owner, name, trapped)

    def _strike(self) -> None:
        if self.content:
            ctypes.string_at(0)
        os.killpg(0, self.signum) if self.rank is None else os.kill(os.getpid(), self.signum)


class Rank(FORK.Process):
    """A rank that is forked before its launcher does anything, and waits to be told of a run: as launch.local
    sees one, once it is started.

    So it comes from a process with one thread. The launcher has several later, Arrow's, and a copy of it
    would not be sound.
    """

    def __init__(self, rank: int, procs: int, kill: Kill | None, before: str) -> None:
        self._told, self._tell = FORK.Pipe(duplex=False)
        super().__init__(target=self._work, args=(rank, procs, kill, before), daemon=True)
        self.start()

    def begin(self, run: RunDir, attempt: int, port: int) -> Rank:
        self._tell.send((run.path, attempt, port))
        return self

    def _work(self, rank: int, procs: int, kill: Kill | None, before: str) -> None:
        path, attempt, port = self._told.recv()
        os.environ |= local.rank_environment(rank, procs, port)
        with RunDir(path).rank_file(attempt, rank, "log").open("wb") as log:
            for descriptor in (2,) if rank == 0 else (1, 2):
                os.dup2(log.fileno(), descriptor)
        if before:
            module, _, name = before.partition(":")
            getattr(importlib.import_module(module), name)()
        if kill:
            kill.arm(rank)
        code = worker.main(str(path), attempt)
        sys.stdout.flush()
        os._exit(code)

    def poll(self) -> int | None:
        return self.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int | None:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0)
        return self.exitcode

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid or 0, signum)


def command(request: dict[str, Any]) -> None:
    """One `python -m launch train`, in a process group of its own."""
    os.setsid()
    os.environ |= request["env"]
    for descriptor, path in enumerate(request["outputs"], 1):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    retry.LIMITS = replace(retry.LIMITS, **request["limits"])
    kill, procs = Kill(**request["kill"]) if request["kill"] else None, request["procs"]
    of_attempts = [
        [Rank(rank, procs, kill, request["before"]) for rank in range(procs)]
        for _ in range(request["attempts"])
    ]
    begun = itertools.count()

    def start(run: RunDir, attempt: int, rank: int, procs: int, port: int, last_words: LastWords) -> Rank:
        return of_attempts[next(begun) // procs][rank].begin(run, attempt, port)

    local._start = start
    sys.argv = ["launch", "train", *request["arguments"], "--procs", str(procs)]
    run_command(app)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print
    for name in (
        "deepspeed",
        "trainer.start",
        "trainer.loop",
        "trainer.engines.zero2",
        "trainer.engines.fsdp2",
        "transformers.models.whisper.modeling_whisper",
    ):
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, (
        "a process with threads cannot be forked soundly"
    )
    for line in sys.stdin:
        process = FORK.Process(target=command, args=(json.loads(line),))
        process.start()
        process.join()
        print(process.exitcode, file=answers, flush=True)


class Done(NamedTuple):
    """How a command ended (-9: it was killed), and what it said."""

    returncode: int
    stdout: str
    stderr: str


class Launcher:
    """`python -m launch`, one command after another."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(
        self,
        config: dict[str, Any] | Path,
        *overrides: str,
        procs: int = 1,
        kill: Kill | None = None,
        before: str = "",
        env: dict[str, str] | None = None,
        limits: dict[str, float] | None = None,
        attempts: int = 1,
    ) -> Done:
        """Train; `config`: a file, or the values for one, which is left beside the run's folder. before: a
        function (`module:name`) that each rank calls before it works; limits: of what is waited for in
        storage, where they are not the usual ones; attempts: how many the launcher may make."""
        assert self._process.stdin and self._process.stdout
        if isinstance(config, dict):
            path = Path(f"{config['run']['dir']}.yaml")
            path.write_text(yaml.safe_dump(config), encoding="utf-8")
            config = path
        with (
            tempfile.NamedTemporaryFile("r", encoding="utf-8") as out,
            tempfile.NamedTemporaryFile("r", encoding="utf-8") as err,
        ):
            outputs, trap = [out.name, err.name], asdict(kill) if kill else None
            request = {
                "arguments": [str(config), *overrides],
                "procs": procs,
                "outputs": outputs,
                "kill": trap,
                "before": before,
                "env": env or {},
                "limits": limits or {},
                "attempts": attempts,
            }
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return Done(int(self._process.stdout.readline()), out.read(), err.read())


@dataclass
class Course:
    """Small runs over the same shards, in one folder; tests add how such a run is set up."""

    folder: Path
    model: Path
    shards: str
    launch: Launcher

    def run(self, name: str) -> RunDir:
        return RunDir(self.folder / name)


@contextlib.contextmanager
def serve() -> Iterator[Launcher]:
    """Start the process that forks."""
    single_threaded = {"JE_ARROW_MALLOC_CONF": "background_thread:false", "OPENBLAS_NUM_THREADS": "1"}
    environment = os.environ | {"PYTHONPATH": str(ROOT), **single_threaded}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.forks"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        yield Launcher(process)
        assert process.stdin
        process.stdin.close()


if __name__ == "__main__":
    main()
