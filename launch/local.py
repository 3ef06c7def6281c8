"""All ranks of a run on this machine: start them, pass signals on, end all when one fails."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from configs.disk import words_of_disk
from configs.errors import ExitCode
from configs.ports import free_ports
from configs.run.causes import Cause
from configs.run.crash_journal import DEATHS, deaths
from configs.run.ends import Failure, rank_errors
from configs.run.events import AttemptBegan, Event, Hung
from configs.run.folder import RunDir
from configs.run.lease import claim
from configs.run.ledger import History
from configs.run.memory import will_halve
from configs.schema import RunConfig
from launch.last_words import LastWords
from launch.snapshot import ROOT
from slurm.chain import record_end, settle
from slurm.shell import for_rank
from slurm.signals import stop_signals

GRACE = 20.0
"""Seconds that the other ranks get to leave by themselves after one has failed."""
GOOD = (ExitCode.FINISHED, ExitCode.SAVED)
KILLED = (
    "by hand, or by the system for want of memory (`dmesg` tells); then lower batch.micro_seconds or"
    " data.read_ahead_mb"
)
TAIL = 20
"""Lines shown of the output of a rank that died without a word."""


def run_ranks(run: RunDir, config: RunConfig, procs: int) -> int:
    """Train on `procs` processes; returns the exit code of the run. The error of the rank that failed is
    printed last. Where less audio at a time may need less memory than there is, it goes on with that.

    Raises ConfigError if another attempt is at work on the run.
    """
    asked_to_stop = threading.Event()
    while True:
        attempt, code = _run_attempt(run, config, procs, asked_to_stop)
        if code in GOOD or asked_to_stop.is_set() or not will_halve(run.ledger.read(), attempt):
            return code
        print("going on with less audio at a time", file=sys.stderr, flush=True)


def _run_attempt(
    run: RunDir, config: RunConfig, procs: int, asked_to_stop: threading.Event
) -> tuple[int, int]:
    """Number and exit code of one attempt."""
    lease = claim(run)
    try:
        settle(run)
        run.proposal.propose(config)
        code, failure = _attempt(run, lease.attempt, procs, asked_to_stop)
        try:
            record_end(run, lease.attempt, code, failure)
        except OSError as error:  # the next start finds it out
            print(f"the ledger is not told of this end: {words_of_disk(error) or error}", file=sys.stderr)
        return lease.attempt, code
    finally:
        if not lease.superseded():
            run.proposal.withdraw()
        lease.release()


def _attempt(
    run: RunDir, attempt: int, procs: int, asked_to_stop: threading.Event
) -> tuple[int, Failure | None]:
    run.ledger.record(AttemptBegan(attempt=attempt, ranks=procs, nodes=[socket.gethostname()]))
    run.attempt_logs(attempt).mkdir(parents=True, exist_ok=True)
    port, last_words = free_ports(1)[0], LastWords.listen()
    ranks = [_start(run, attempt, rank, procs, port, last_words) for rank in range(procs)]
    left_at_once = _pass_signals_to(ranks, asked_to_stop)
    try:
        codes = _wait(ranks)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
    if all(code in GOOD for code in codes):
        return max(process.returncode for process in ranks), None
    if left_at_once.is_set():
        return _left_at_once(run)
    return _explain(run, attempt, codes, last_words.read())


def _start(
    run: RunDir, attempt: int, rank: int, procs: int, port: int, last_words: LastWords
) -> subprocess.Popen[bytes]:
    own_code_first = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = (
        for_rank(os.environ)
        | rank_environment(rank, procs, port)
        | last_words.environment
        | {"EARWITNESS_DIE_WITH": str(os.getpid()), "PYTHONPATH": own_code_first, "PYTHONSAFEPATH": "1"}
    )
    command = [sys.executable, "-m", "launch.worker", str(run.path), str(attempt)]
    # In a session of its own, so that Ctrl-C reaches the launcher alone, which asks all ranks to save.
    with run.rank_file(attempt, rank, "log").open("wb") as log:
        return subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            stdout=None if rank == 0 else log,
            stderr=log,
            pass_fds=[last_words.descriptor],
        )


def rank_environment(rank: int, procs: int, port: int) -> dict[str, str]:
    """What tells a rank on this machine which one of `procs` it is, and where all meet."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(procs),
        "LOCAL_WORLD_SIZE": str(procs),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _pass_signals_to(ranks: list[subprocess.Popen[bytes]], asked_to_stop: threading.Event) -> threading.Event:
    """From now on. Returns what tells whether somebody would not wait for the save."""
    left_at_once = threading.Event()

    def pass_on(signum: int, frame: object) -> None:
        is_first = not asked_to_stop.is_set()
        asked_to_stop.set()  # before words, in the midst of which the next signal may come
        is_insisting = signum == signal.SIGINT and not is_first
        if is_insisting:
            left_at_once.set()
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if is_insisting else signal.SIGTERM)
        if is_first:
            print(
                "\nstopping: saving at the end of this step (Ctrl-C again to leave at once)",
                file=sys.stderr,
                flush=True,
            )

    for signum in stop_signals():
        signal.signal(signum, pass_on)
    if asked_to_stop.is_set():  # between two attempts
        for process in ranks:
            process.terminate()
    return left_at_once


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


def _left_at_once(run: RunDir) -> tuple[int, Failure]:
    """Say what somebody has lost who would not wait for the save."""
    step = run.ledger.read().saved_step
    newest = f"the newest checkpoint is of step {step}" if step else "there is no checkpoint yet"
    words = f"left at once, not saved; {newest}"
    print(f"\n{words} ({run.checkpoints}). The same command goes on from there", file=sys.stderr, flush=True)
    return 1, Failure(Cause.CANCELLED, f"{words} (Ctrl-C twice)", by_signal=True)


def _explain(
    run: RunDir, attempt: int, codes: list[int | None], last_words: list[Event]
) -> tuple[int, Failure | None]:
    """Print the error that ended the run. Returns its exit code, and a failure that the ledger does not tell
    of. last_words: of ranks that could not tell the ledger.

    A rank that was killed is the cause, the others only lost it. One that has aborted is not, unless it was
    decoding: NCCL does so to those that wait for another one.
    """
    history = History([*run.ledger.read().events, *last_words])
    samples = {death.rank: death for death in deaths(run, attempt)}
    failed = [rank for rank, code in enumerate(codes) if code not in (None, *GOOD)]
    killed = [rank for rank in failed if _is_killed(codes[rank])]
    culprits = list(samples) or killed
    hang = history.last(Hung, attempt)
    errors = rank_errors(history, attempt)
    failure = None
    if not culprits and hang:
        rank = failed[0]
        message = f"hang: {hang.words}\nAll stacks are in {run.attempt_logs(attempt)}/rank-*.stacks"
    elif not culprits and errors:
        rank, message = errors[0].rank, errors[0].message
        for other in failed:
            if codes[other] == -signal.SIGABRT:
                message += f"\nrank {other} was aborted (its log: {run.rank_file(attempt, other, 'log')})"
        if errors[0] in last_words:
            failure = Failure(errors[0].cause, f"rank {rank}: {errors[0].words}")
    else:
        rank = (culprits or failed)[0]
        code = codes[rank] or 0
        ended = f"ended with exit code {code}"
        if code < 0:
            ended = f"was killed by {signal.Signals(-code).name}"
        failure = Failure(Cause.CRASH, f"rank {rank} {ended}", by_signal=code < 0, rank=rank)
        hint = ""
        if rank in samples:
            hint = f": {samples[rank]}. Start again; when it has ended {DEATHS} attempts, it is left out"
        elif code == -signal.SIGKILL:
            hint = f": {KILLED}"
        message = "\n".join([*_last_output(run, attempt, rank), f"rank {rank} {ended}{hint}"])
    log = run.rank_file(attempt, rank, "log")
    print(f"\nerror on rank {rank} (its log: {log}):\n{message.strip()}", file=sys.stderr, flush=True)
    return max(codes[rank] or 0, 1), failure


def _is_killed(code: int | None) -> bool:
    return code is not None and code < 0 and code != -signal.SIGABRT


def _last_output(run: RunDir, attempt: int, rank: int) -> list[str]:
    """The last lines of a rank's log, and the first ones of the trace of its crash, if there is one."""
    log, trace = (run.rank_file(attempt, rank, ending) for ending in ("log", "fatal"))
    lines = log.read_text(errors="replace", encoding="utf-8").splitlines()[-TAIL:]
    if trace.exists():
        _, mark, after = trace.read_text(errors="replace", encoding="utf-8").partition("Current thread")
        lines += (mark + after).splitlines()[:TAIL]
    return lines
