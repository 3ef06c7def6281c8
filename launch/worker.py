"""What every rank runs: `python -m launch.worker RUN ATTEMPT`, told by RANK, WORLD_SIZE and LOCAL_RANK, or by
srun, which one it is.

Here the trainer and the signals of a job meet.
"""

# ruff: noqa: E402

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from configs.streams import open_streams, speak_utf8
from slurm.signals import StopFlag

STOP = StopFlag()
if __name__ == "__main__":
    speak_utf8()
    open_streams(unheeded=True)
    gc.disable()  # imports leave no garbage, but look for it would take a sixth of their time
    STOP.install()  # before the imports, which may take long on a network file system

from configs.cores import cores_of_rank, decoding_threads
from configs.disk import words_of_disk
from configs.errors import ConfigError, ExitCode, PeerFailed, UnfitNode
from configs.run.crash_journal import CrashJournal
from configs.run.events import (
    AttemptBegan,
    DeathInHand,
    Hung,
    MicroSeconds,
    RankFailed,
    TrainingBegan,
    TrainingEnded,
)
from configs.run.folder import RunDir
from configs.run.lease import Lease
from configs.run.stopwatch import Stopwatch
from configs.trackers import check_trackers
from launch import snapshot
from launch.failures import diagnose
from launch.last_words import speak
from slurm.job import in_job, join_job, node_name
from slurm.watchdog import Hang, Watchdog

if TYPE_CHECKING:
    from trainer.distributed import World
    from trainer.loop import Outcome
    from trainer.session import Session

PR_SET_PDEATHSIG = 1
EXIT_SECONDS = 20.0
"""That libraries get at the end of a process."""


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
            return _train(run, lease, rank, stop)
    except Exception as error:
        return _report(run, attempt, rank, error)


def _train(run: RunDir, lease: Lease, rank: int, stop: StopFlag) -> int:
    stopwatch = Stopwatch()
    snapshot.check(run.code if in_job() else snapshot.ROOT)
    config = run.proposal.read()
    if rank == 0:  # which alone speaks to them
        check_trackers(config.monitor.trackers)
    slots = 2 * decoding_threads(config.data)  # of training's loader, and of an evaluation's
    journal = CrashJournal(slots, run.rank_file(lease.attempt, rank, "inhand"))
    nodes = _node_of_each_rank(run, lease.attempt)
    watch = _watchdog(run, lease, rank, nodes, journal, config.slurm.hang_seconds)
    _set_up_memory()
    _set_up_cache()
    # Imported here, so that a signal during these seconds is already heeded.
    stopwatch.lap("interpreter")
    import torch

    stopwatch.lap("torch")
    from trainer import devices, distributed
    from trainer.loop import Outcome, train
    from trainer.preflight import look_over
    from trainer.start import Start, StopRequested

    gc.freeze()  # what is imported stays
    gc.enable()
    stopwatch.lap("imports")
    torch.set_num_threads(cores_of_rank())
    gpus_per_node = config.slurm.gpus_per_node if in_job() else None
    grace_seconds = config.slurm.signal_seconds if in_job() else None
    local_rank = int(os.environ["LOCAL_RANK"])
    device = devices.choose_device(local_rank, node_name(), gpus_per_node)
    devices.take(device, node_name() if in_job() else None)
    world = distributed.start(nodes, device)
    names = world.gather(devices.name_of(device))
    stopwatch.lap("meeting")
    if in_job():
        look_over(config, run, lease.attempt, node_name(), world)
        stopwatch.lap("preflight")
    try:
        session = Start(config, run, lease, world, stop, stopwatch).session(journal, grace_seconds)
    except StopRequested:
        return _leave(run, lease, world, stop, Outcome.SAVED, run.ledger.read().saved_step)
    if world.rank == 0:
        lease.check()
        run.proposal.accept()
        session.checkpoints.begin_mirror()
        _tell_start(session, names or [])
    outcome = train(session, stop, watch)
    code = _leave(run, lease, world, stop, outcome, session.state.step)
    watch.close()
    if outcome is Outcome.FINISHED:
        session.checkpoints.finish_mirror()  # now that nobody waits for this rank
    return code


def _set_up_memory() -> None:
    """Let torch take memory in large pieces, unless it was told otherwise. Call before it is imported.

    That of a GPU in segments that grow: lengths differ from batch to batch, which would leave it in pieces.
    That of a CPU in huge pages: as often as not, what large tensors cost is the first touch of their pages.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _set_up_cache() -> None:
    """Let torch do without a cache folder that cannot be written, at the sight of which it would end."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    folder = os.environ.get(name)
    if not folder:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        print(f"{name}: goes on without it: {words_of_disk(error)}", file=sys.stderr, flush=True)
        del os.environ[name]


def _tell_start(session: Session, devices: list[str]) -> None:
    """devices: what each rank computes on."""
    step, world = session.state.step, session.world
    session.run.ledger.record(
        TrainingBegan(
            attempt=session.attempt,
            step=step,
            total_steps=session.total_steps,
            global_size=session.config.batch.global_size,
            ranks=world.size,
            device=str(world.device),
        )
    )
    begins = f"resumes at step {step}" if step else "starts"
    on = ", ".join(f"{count} x {name}" for name, count in Counter(devices).items())
    print(
        f"{session.run.path}: {begins} of {session.total_steps}, {on}, attempt {session.attempt}", flush=True
    )


def _leave(run: RunDir, lease: Lease, world: World, stop: StopFlag, outcome: Outcome, step: int) -> int:
    """Note how it ended, and part from the others."""
    from trainer import distributed
    from trainer.loop import Outcome

    if world.rank == 0:
        run.ledger.record(
            TrainingEnded(attempt=lease.attempt, step=step, outcome=outcome.value, signal=stop.name)
        )
    world.barrier()
    distributed.end()
    return ExitCode.FINISHED if outcome is Outcome.FINISHED else ExitCode.SAVED


def _watchdog(
    run: RunDir, lease: Lease, rank: int, nodes: list[str], journal: CrashJournal, seconds: float | None
) -> Watchdog:
    """The watchdog of this rank: it writes a hang into the ledger, and the samples that seem to be at
    fault."""

    def report(hang: Hang) -> None:
        run.ledger.record(
            Hung(attempt=lease.attempt, words=hang.words, node=hang.node, suspects=hang.suspects)
        )

    def in_hand(limit: float) -> str:
        samples = journal.endless(limit)
        for sample in samples:
            run.ledger.record(
                DeathInHand(
                    attempt=lease.attempt, rank=rank, key=sample.key, shard=sample.shard, how="never ended"
                )
            )
        return ", ".join(f"{sample.key} of {sample.shard}" for sample in samples)

    return Watchdog(
        run.attempt_logs(lease.attempt),
        rank,
        nodes,
        seconds=seconds,
        in_hand=in_hand,
        report=report,
        orphaned=lease.superseded,
    )


def _node_of_each_rank(run: RunDir, attempt: int) -> list[str]:
    """The node of each rank, by number: every node has as many, one after the other.

    Raises ConfigError if this one was told of other ranks than the attempt has: it would train alone, and
    save when srun ends it, as if somebody had asked.
    """
    ranks = int(os.environ["WORLD_SIZE"])
    began = run.ledger.read().last(AttemptBegan, attempt)
    nodes = began.nodes if began else [node_name()]
    if began and began.ranks != ranks:
        raise ConfigError(
            f"this rank was told that there are {ranks}, but attempt {attempt} has {began.ranks}: look in"
            " slurm.srun_args, slurm.setup and slurm.python for what changes how many tasks srun starts, or"
            " what it tells them (SLURM_STEP_NUM_TASKS)"
        )
    return [nodes[rank * len(nodes) // ranks] for rank in range(ranks)]


@contextmanager
def _crash_report(run: RunDir, attempt: int, rank: int) -> Iterator[None]:
    """Let a crash in native code leave its trace in a file, beside what was in hand then. At an end that
    Python sees, both are removed."""
    run.attempt_logs(attempt).mkdir(parents=True, exist_ok=True)
    trace = run.rank_file(attempt, rank, "fatal")
    with trace.open("w", encoding="utf-8") as file:
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.enable()  # into the log
            trace.unlink(missing_ok=True)
            run.rank_file(attempt, rank, "inhand").unlink(missing_ok=True)


def _report(run: RunDir, attempt: int, rank: int, error: Exception) -> int:
    """Say why this rank fails, to the log and to the ledger; returns its exit code. One that only leaves
    because another one has failed does not tell the ledger."""
    config, taken = None, None
    with suppress(ConfigError, OSError):  # they may be what fails
        config, taken = run.proposal.read(), run.ledger.read().last(MicroSeconds, attempt)
    diagnosis = diagnose(error, config, taken)
    if isinstance(error, OSError):  # told in words, and may still be our own fault
        traceback.print_exception(error)
    print(diagnosis.message, file=sys.stderr, flush=True)
    if not isinstance(error, PeerFailed):
        failed = RankFailed(
            attempt=attempt,
            rank=rank,
            node=error.node if isinstance(error, UnfitNode) else node_name(),
            cause=diagnosis.cause,
            exit_code=diagnosis.exit_code,
            message=diagnosis.message,
        )
        try:
            run.ledger.record(failed)
        except OSError:
            with suppress(OSError):
                speak(run, failed)
    return diagnosis.exit_code


def _run_exit_functions() -> None:
    """Let libraries write what they still have, as wandb, which would wait long for a server that is gone."""
    last = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
    last.start()
    last.join(EXIT_SECONDS)


def _die_with(launcher: int) -> None:
    """Let the kernel kill this process when its parent, the launcher, is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it was killed before
        os._exit(1)


if __name__ == "__main__":
    join_job()
    if "EARWITNESS_DIE_WITH" in os.environ:
        _die_with(int(os.environ["EARWITNESS_DIE_WITH"]))
    code = main(sys.argv[1], int(sys.argv[2]))
    sys.stdout.flush()
    if code in (ExitCode.FINISHED, ExitCode.SAVED):
        _run_exit_functions()
    os._exit(code)  # not sys.exit: threads that still wait for a read would hold the process
