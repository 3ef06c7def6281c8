"""What every rank runs: `python -m launch.worker RUN ATTEMPT`, told by RANK, WORLD_SIZE and LOCAL_RANK, or by
srun, which one it is.

Here the trainer and the signals of a job meet.
"""

# ruff: noqa: E402

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from slurm.signals import StopFlag

STOP = StopFlag()
if __name__ == "__main__":
    STOP.install()  # before the imports, which may take long on a network file system

from configs.errors import EarwitnessError, ExitCode
from configs.lease import Lease
from configs.rundir import RunDir, write_atomic
from data.in_hand import InHand
from slurm.job import in_job, join_job, node_name
from slurm.watchdog import Hang, Watchdog

if TYPE_CHECKING:
    from trainer.distributed import World
    from trainer.loop import Outcome

PR_SET_PDEATHSIG = 1


def main(run_path: str, attempt: int) -> int:
    """Train, and return this rank's exit code."""
    stop = STOP.install()
    run = RunDir(run_path)
    rank = int(os.environ["RANK"])
    lease = Lease(run, attempt)
    try:
        if rank == 0:
            lease.check()
            lease.keep()
        with _crash_report(run, attempt, rank):
            return _train(run, lease, stop)
    except EarwitnessError as error:
        _report(run, lease, rank, error, str(error), error.exit_code)
        return error.exit_code
    except Exception as error:
        message = out_of_memory(error, run) or traceback.format_exc()
        _report(run, lease, rank, error, message, 1)
        return 1


def _train(run: RunDir, lease: Lease, stop: StopFlag) -> int:
    config, rank = run.read_next_config(), int(os.environ["RANK"])
    threads = 2 * config.data.threads + 1  # training's, validation's, and the main one for the panel
    in_hand = InHand(threads, error_file(run, lease.attempt, rank).with_suffix(".inhand"))
    nodes = _nodes(run, lease.attempt)
    watch = _watchdog(run, lease, rank, nodes, in_hand, config.slurm.hang_seconds)
    # Imported here, so that a signal during these seconds is already heeded.
    import torch

    from trainer import distributed
    from trainer.loop import Outcome, train
    from trainer.preflight import look_over
    from trainer.start import Stopped, prepare

    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["WORLD_SIZE"])))
    gpus, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if (
        in_job() and config.slurm.gpus_per_node > 0 and gpus <= (local_rank if gpus != 1 else 0)
    ):  # one: the site binds each rank to its own
        raise distributed.UnfitNode(
            node_name(), f"{node_name()}: only {gpus} of {config.slurm.gpus_per_node} GPUs answer"
        )
    world = distributed.start(nodes)
    if in_job():
        look_over(config, run, lease.attempt, node_name(), world)
    try:
        session = prepare(
            config, run, lease, world, stop, in_hand, grace=config.slurm.signal_seconds if in_job() else None
        )
    except Stopped:
        return _leave(run, lease, world, stop, Outcome.SAVED, run.saved_step())
    if world.rank == 0:
        lease.check()
        run.accept_config()
        about = {
            "of": session.total_steps,
            "global_size": config.batch.global_size,
            "ranks": world.size,
            "device": str(world.device),
        }
        run.record("start", attempt=lease.attempt, step=session.state.step, **about)
        resumed = f"resumes at step {session.state.step}" if session.state.step else "starts"
        print(
            f"{run.path}: {resumed} of {session.total_steps}, {world.size} x {world.device.type}, attempt"
            f" {lease.attempt}",
            flush=True,
        )
    outcome = train(session, stop, watch)
    code = _leave(run, lease, world, stop, outcome, session.state.step)
    watch.close()
    if outcome is Outcome.FINISHED and session.mirror:
        session.mirror.finish()  # now that nobody waits for this rank
    return code


def _leave(run: RunDir, lease: Lease, world: World, stop: StopFlag, outcome: Outcome, step: int) -> int:
    """Note how it ended, and part from the others."""
    from trainer import distributed
    from trainer.loop import Outcome

    if world.rank == 0:
        run.record("stop", attempt=lease.attempt, step=step, outcome=outcome.value, signal=stop.name)
    world.barrier()
    distributed.end()
    return ExitCode.FINISHED if outcome is Outcome.FINISHED else ExitCode.SAVED


def _watchdog(
    run: RunDir, lease: Lease, rank: int, nodes: list[str], in_hand: InHand, seconds: float | None
) -> Watchdog:
    """This rank's, which writes a hang into the ledger, and the samples that seem to be at fault."""

    def report(hang: Hang) -> None:
        run.record("hang", attempt=lease.attempt, words=hang.words, node=hang.node, suspects=hang.suspects)
        write_atomic(
            error_file(run, lease.attempt, rank),
            f"hang: {hang.words}\nAll stacks are in {run.attempt_logs(lease.attempt)}/rank-*.stacks",
        )

    def held(patience: float) -> str:
        return ", ".join(
            f"{one.key} of {one.shard}" for one in in_hand.record_endless(run, lease.attempt, rank, patience)
        )

    return Watchdog(
        run.attempt_logs(lease.attempt),
        rank,
        nodes,
        seconds=seconds,
        in_hand=held,
        report=report,
        orphaned=lease.superseded,
    )


def _nodes(run: RunDir, attempt: int) -> list[str]:
    """That of each rank."""
    ranks = int(os.environ["WORLD_SIZE"])
    nodes = next(
        (line["nodes"] for line in run.ledger("attempt") if line["attempt"] == attempt and "nodes" in line),
        [node_name()],
    )
    return [nodes[number * len(nodes) // ranks] for number in range(ranks)]


@contextmanager
def _crash_report(run: RunDir, attempt: int, rank: int) -> Iterator[None]:
    """Let a crash in native code leave its trace in a file, beside what was in hand then. At an end that
    Python sees, both are removed."""
    trace = error_file(run, attempt, rank).with_suffix(".fatal")
    with trace.open("w", encoding="utf-8") as file:
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.enable()  # into the log
            trace.unlink(missing_ok=True)
            trace.with_suffix(".inhand").unlink(missing_ok=True)


def out_of_memory(error: Exception, run: RunDir) -> str | None:
    """What to do about it, if the error is that memory ran out: numpy's, torch's on a GPU, or torch's on a
    CPU."""
    if not (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    ):
        return None
    size = run.read_next_config().batch.micro_size
    said = next(iter(str(error).splitlines()), type(error).__name__)
    return (
        f"there is too little memory: {said}\nLower batch.micro_size ({size} now; it changes nothing but"
        " rounding), set model.gradient_checkpointing=true, lower data.read_ahead_mb if it is the host's"
        " memory, or take more memory, and start again."
    )


def _report(run: RunDir, lease: Lease, rank: int, error: Exception, message: str, exit_code: int) -> None:
    """Leave the error where the launcher finds it, and in the ledger."""
    print(message, file=sys.stderr, flush=True)
    kind, node = type(error).__name__, getattr(error, "node", node_name())
    if kind != "PeerFailed":
        run.record(
            "error",
            attempt=lease.attempt,
            rank=rank,
            node=node,
            kind=kind,
            exit_code=exit_code,
            message=message,
        )
        write_atomic(error_file(run, lease.attempt, rank), message)


def error_file(run: RunDir, attempt: int, rank: int) -> Path:
    """Where a rank leaves its error; what it prints is beside it, in `.log`."""
    folder = run.attempt_logs(attempt)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"rank-{rank:05d}.error"


if __name__ == "__main__":
    join_job()
    if launcher := os.environ.get("EARWITNESS_DIE_WITH"):  # a launcher that is killed takes its ranks along
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(launcher):
            os._exit(1)
    code = main(sys.argv[1], int(sys.argv[2]))
    sys.stdout.flush()
    if code in (ExitCode.FINISHED, ExitCode.SAVED):
        atexit._run_exitfuncs()  # libraries that still have to write something, as wandb has
    os._exit(code)  # not sys.exit: threads that still wait for a read would hold the process
