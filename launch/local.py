"""All ranks of a run on this machine: start them, pass signals on, end all when one fails."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from configs.errors import ExitCode
from configs.lease import claim
from configs.ports import free_ports
from configs.rundir import RunDir
from configs.schema import RunConfig
from data.in_hand import DEATHS, deaths
from launch.worker import error_file
from slurm.chain import Cause, Failure, record_end, settle

GRACE = 20.0
"""Seconds that the other ranks get to leave by themselves after one has failed."""
GOOD = (ExitCode.FINISHED, ExitCode.SAVED)
KILLED = (
    "by hand, or by the system for want of memory (`dmesg` tells); then lower batch.micro_size or"
    " data.read_ahead_mb"
)
TAIL = 20
"""Lines shown of the output of a rank that died without a word."""


def run_ranks(run: RunDir, config: RunConfig, procs: int) -> int:
    """Train on `procs` processes; returns the exit code of the run. The error of the rank that failed is
    printed last.

    Raises ConfigError if another attempt is at work on the run.
    """
    lease = claim(run)
    try:
        settle(run)
        run.ask(config)
        code, failure = _attempt(run, lease.attempt, procs)
        record_end(run, lease.attempt, code, failure)
        return code
    finally:
        run.next_config.unlink(missing_ok=True)  # if it was refused: the next attempt must not read it
        lease.release()


def _attempt(run: RunDir, attempt: int, procs: int) -> tuple[int, Failure | None]:
    run.record("attempt", attempt=attempt, host=socket.gethostname(), ranks=procs)
    port = free_ports(1)[0]
    ranks = [_start(run, attempt, rank, procs, port) for rank in range(procs)]
    _pass_signals_to(ranks)
    try:
        codes = _wait(ranks)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
    if all(code in GOOD for code in codes):
        return max(process.returncode for process in ranks), None
    return _explain(run, attempt, codes)


def _start(run: RunDir, attempt: int, rank: int, procs: int, port: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(procs),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "EARWITNESS_DIE_WITH": str(os.getpid()),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
        ),
    }
    command = [sys.executable, "-m", "launch.worker", str(run.path), str(attempt)]
    # In a session of its own, so that Ctrl-C reaches the launcher alone, which asks all ranks to save.
    with log_file(run, attempt, rank).open("wb") as log:
        return subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=None if rank == 0 else log, stderr=log
        )


def log_file(run: RunDir, attempt: int, rank: int) -> Path:
    """What a rank wrote, but for what rank 0 shows on the terminal."""
    return error_file(run, attempt, rank).with_suffix(".log")


def _pass_signals_to(ranks: list[subprocess.Popen[bytes]]) -> None:
    asked = False

    def pass_on(signum: int, frame: object) -> None:
        nonlocal asked
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if asked and signum == signal.SIGINT else signal.SIGTERM)
        if not asked:
            print(
                "\nstopping: saving at the end of this step (Ctrl-C again to leave at once)",
                file=sys.stderr,
                flush=True,
            )
        asked = True

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, pass_on)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> list[int | None]:
    """Wait for all ranks, or GRACE seconds after the first one has failed; their exit codes then (None: still
    running)."""
    deadline = float("inf")
    while time.monotonic() < deadline:
        codes = [process.poll() for process in ranks]
        running = [process for process, code in zip(ranks, codes, strict=True) if code is None]
        if not running:
            break
        if deadline == float("inf") and any(code not in (None, *GOOD) for code in codes):
            deadline = time.monotonic() + GRACE
        with contextlib.suppress(subprocess.TimeoutExpired):
            running[0].wait(timeout=0.2)
    return [process.poll() for process in ranks]


def _explain(run: RunDir, attempt: int, codes: list[int | None]) -> tuple[int, Failure | None]:
    """Print the error that ended the run; returns its exit code, and a failure that the ledger does not tell
    of.

    A rank that was killed is the cause, the others only lost it. One that has aborted is not, unless it was
    decoding: NCCL does so to those that wait for another one.
    """
    reports = {rank: path for rank in range(len(codes)) if (path := error_file(run, attempt, rank)).exists()}
    silent = [rank for rank, code in enumerate(codes) if code not in (None, *GOOD) and rank not in reports]
    failure = None
    samples = {death.rank: death for death in deaths(run, attempt)}
    killed = [*samples] or [
        rank for rank in silent if (codes[rank] or 0) < 0 and codes[rank] != -signal.SIGABRT
    ]
    if reports and not killed:
        rank = min(reports, key=lambda rank: reports[rank].stat().st_mtime_ns)
        aborted = [other for other in silent if codes[other] == -signal.SIGABRT]
        message = reports[rank].read_text(encoding="utf-8") + "".join(
            f"\nrank {other} was aborted (its log: {log_file(run, attempt, other)})" for other in aborted
        )
    else:
        rank = (killed or silent)[0]
        code = codes[rank] or 0
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        failure = Failure(Cause.CRASH, f"rank {rank} {ended}", "", by_signal=code < 0)
        hint = f": {KILLED}" if code == -signal.SIGKILL else ""
        if rank in samples:
            hint = f": {samples[rank]}. Start again; when it has ended {DEATHS} attempts, it is left out"
        trace = log_file(run, attempt, rank).with_suffix(".fatal")
        said = log_file(run, attempt, rank).read_text(errors="replace", encoding="utf-8").splitlines()[-TAIL:]
        if trace.exists():
            said += "".join(
                trace.read_text(errors="replace", encoding="utf-8").partition("Current thread")[1:]
            ).splitlines()[:TAIL]
        message = "\n".join([*said, f"rank {rank} {ended}{hint}"])
    print(
        f"\nerror on rank {rank} (its log: {log_file(run, attempt, rank)}):\n{message.strip()}",
        file=sys.stderr,
        flush=True,
    )
    code = codes[rank] or 0
    return (code if code > 0 else 1), failure
