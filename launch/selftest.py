"""`launch selftest`: on a cluster that nobody has tried yet, everything once, with the config that is to be
trained: minutes, and one table."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from configs.errors import ConfigError, EarwitnessError
from configs.run.causes import Cause
from configs.run.events import AttemptBegan, ChainEnded, CheckpointSaved, Event, Preflight, TrainingBegan
from configs.run.folder import RunDir
from configs.schema import RunConfig, node_range
from launch.control import wait_for
from launch.submit import submit_run
from slurm import cluster
from slurm.chain import chain_jobs

E = TypeVar("E", bound=Event)
STEPS, SAVE_EVERY = 20, 5


def selftest(config: RunConfig, minutes: float) -> int:
    """Submit a short run, kill it, let it go on with fewer processes, and export it; returns 0 if all went
    well.

    Raises ConfigError where the config or the cluster would not even take the job.
    """
    most = node_range(config.slurm.nodes)[1]
    run = RunDir(config.run.dir.with_name(f"{config.run.dir.name}-selftest"))
    if run.path.exists():
        if not run.slurm.is_dir():
            raise ConfigError(f"{run.path}: is in the way, and is not the folder of a selftest")
        if cluster.queued(chain_jobs(run)):
            raise ConfigError(
                f"{run.path}: another selftest is at work; `python -m launch stop {run.path}` ends it"
            )
        shutil.rmtree(run.path)
    changes = {
        "run": {"name": f"{config.run.name}-selftest", "dir": run.path},
        "optim": {"max_steps": STEPS, "epochs": None},
        "checkpoint": {"every_steps": SAVE_EVERY, "mirror": None},
        "evaluate": {"every_steps": 10**9, "captions": 0, "max_samples": config.batch.global_size},
        "monitor": {"every_steps": 1},
        "slurm": {"nodes": most, "resubmit": "chain", "time_minutes": min(60, config.slurm.time_minutes)},
    }
    short = config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    )
    test = _Test(run, time.time() + 60 * minutes)
    try:
        test.train_and_save(short)
        test.kill_and_resume(short)
        test.export()
    except EarwitnessError as error:
        test.row("stopped", str(error), good=False)
    finally:
        cluster.cancel(*[job.job for job in cluster.queued(chain_jobs(run))])
    Console().print(test.table)
    if test.failed:
        print(f"verdict: see the last line; logs are in {run.slurm}")
        return 1
    print("verdict: this cluster is ready for it")
    return 0


class _Test:
    """What a selftest does, a row of its table for each step."""

    def __init__(self, run: RunDir, deadline: float) -> None:
        self.run, self.deadline, self.failed = run, deadline, False
        self.table = Table(
            "what", "", "found", "seconds", title=f"earwitness selftest, {run.path}", title_justify="left"
        )

    def row(self, what: str, details: str, seconds: float | None = None, *, good: bool = True) -> None:
        """Tell of a step."""
        if not good:
            self.failed = True
        verdict = "[green]ok" if good else "[red]bad"
        took = "" if seconds is None else f"{seconds:.1f}"
        self.table.add_row(what, verdict, details, took)
        print(f"{what}: {details}", flush=True)

    def train_and_save(self, config: RunConfig) -> None:
        """Submit the run, and wait for its first checkpoint."""
        submitted = time.time()
        submit_run(config, dry_run=False)
        began = self.wait(AttemptBegan, "the first job to start")
        self.row("queue", f"job {began.job} on {', '.join(began.nodes)}", began.time - submitted)
        preflight = self.wait(Preflight, "the look at all nodes")
        speeds = f", all-reduce {preflight.all_reduce_gb_per_second:.2f} GB/s"
        if preflight.tflops:
            speeds += f", {min(preflight.tflops):.0f} to {max(preflight.tflops):.0f} TFLOP/s per GPU"
        self.row("nodes", f"{began.ranks} processes{speeds}", preflight.seconds)
        started = self.wait(TrainingBegan, "the model to be loaded")
        self.row("start-up", f"on {started.device}", started.time - began.time)
        saved = self.wait(CheckpointSaved, "the first checkpoint")
        self.row("training", f"{saved.step} steps", saved.time - started.time)
        blocking = f"training stopped for {saved.blocking_seconds:.2f} s"
        self.row("checkpoint", f"{saved.bytes / 1e9:.2f} GB, {blocking}", saved.total_seconds)

    def kill_and_resume(self, config: RunConfig) -> None:
        """Kill all processes, and see the run finished on half the nodes."""
        first = self.wait(AttemptBegan, "the first job to start")
        nodes = len(first.nodes)
        if nodes > 1:
            following = (self.run.slurm / "jobs" / f"{first.job}.next").read_text(encoding="utf-8").strip()
            cluster.set_nodes(following, nodes // 2, nodes // 2 * config.slurm.tasks)
        killed = time.time()
        # The ranks' step: to the whole job it would mean that it is cancelled.
        cluster.send_signal(f"{first.job}.1", "KILL")
        second = self.wait(AttemptBegan, "the next attempt", first.attempt + 1)
        goes_on = f"job {second.job} goes on by itself on {', '.join(second.nodes)}"
        self.row("all processes killed", goes_on, second.time - killed)
        resumed = self.wait(TrainingBegan, "the checkpoint to be loaded", first.attempt + 1)
        where = f"at step {resumed.step} on {resumed.ranks} processes instead of {first.ranks}"
        self.row("resumed", where, resumed.time - second.time)
        end = self.wait(ChainEnded, "the end")
        is_finished = end.why == Cause.FINISHED.words
        self.row("finished", f"{end.why}, {STEPS} steps", end.time - resumed.time, good=is_finished)

    def export(self) -> None:
        """Export what was trained."""
        began = time.time()
        out = self.run.path / "export"
        done = subprocess.run(
            [sys.executable, "-m", "tools.export", str(self.run.path), str(out)],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        is_exported = done.returncode == 0
        details = str(out) if is_exported else done.stderr.strip()
        self.row("export", details, time.time() - began, good=is_exported)

    def wait(self, kind: type[E], what: str, from_attempt: int = 0) -> E:
        """Wait for an event of the ledger."""
        return wait_for(self.run, kind, what, self.deadline, from_attempt)
