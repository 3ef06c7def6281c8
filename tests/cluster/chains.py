"""A run on the real cluster, and what tests do to it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml

from configs.run.events import AttemptBegan, ChainEnded, Ended, Evaluated, Submitted
from configs.run.folder import RunDir
from slurm.chain import chain_jobs
from tests.leftovers import OF_A_JOB, OF_LAUNCHERS, OPTIONS
from tests.making import audit_of_attempts, config_values, run_program
from tools.sandbox.slurm import Cluster

T = TypeVar("T")
FAULTS = Path(__file__).parent / "faults"
POLL = 0.1


@dataclass
class Chain:
    """A run of small steps, 2 nodes x 2 ranks, and its jobs."""

    cluster: Cluster
    config: Path
    run: RunDir
    faults: Path = Path()
    """Folder for errors from outside."""

    def launch(self, command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return run_program("launch", command, *arguments, env=self.cluster.environment)

    def submit(self, *overrides: str) -> str:
        """Submit from a shell full of what other jobs and launchers have left; returns the first job."""
        shell = self.cluster.environment | OF_LAUNCHERS | OF_A_JOB | OPTIONS
        done = run_program("launch", "submit", self.config, *overrides, env=shell)
        assert done.returncode == 0, done.stderr
        return str(self.run.ledger.read().of(Submitted)[-1].job)

    def jobs(self) -> list[str]:
        """This run's jobs in the queue, as `2 RUNNING`."""
        queue = self.cluster.run("squeue", "--noheader", "--format=%i %T").splitlines()
        return [line for line in queue if line.split()[0] in chain_jobs(self.run)]

    def wait(self, what: str, look: Callable[[], T | None], seconds: float = 120) -> T:
        """Wait until a look finds something."""
        deadline = time.monotonic() + seconds
        while not (found := look()):
            assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s\n{self.said()}"
            time.sleep(POLL)
        return found

    def training(self, after: int = -1, steps: int = 3) -> int:
        """Wait until an attempt later than `after` has taken so many steps; returns its number."""

        def look() -> list[int]:
            attempts = [line["attempt"] for line in self.run.audit.read().values if line["rank"] == 0]
            last = max((attempt for attempt in attempts if attempt > after), default=-1)
            return [last] if attempts.count(last) >= steps else []

        return self.wait(f"an attempt after {after} that trains", look)[0]

    def finished(self, seconds: float = 180) -> str:
        """Wait until the chain has ended; returns why."""

        def look() -> list[ChainEnded]:
            return [] if self.jobs() else self.run.ledger.read().of(ChainEnded)

        return self.wait("the end of the chain", look, seconds)[-1].why

    def job(self) -> str:
        """The job of the newest attempt."""
        return str(self.run.ledger.read().of(AttemptBegan)[-1].job)

    def nodes(self) -> list[str]:
        """The nodes of the newest attempt."""
        return list(self.run.ledger.read().of(AttemptBegan)[-1].nodes)

    def pid(self, rank: int) -> int:
        """Process of a rank of the newest attempt."""
        # By the run's folder, too: other tests have clusters of their own, whose jobs have the same numbers.
        command = f"launch.worker\0{self.run.path}\0".encode()
        wanted = {f"SLURM_JOB_ID={self.job()}", f"SLURM_PROCID={rank}"}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if command in (process / "cmdline").read_bytes() and wanted <= set(
                    (process / "environ").read_text(encoding="utf-8").split("\0")
                ):
                    return int(process.name)
            except OSError:
                continue
        raise AssertionError(f"no process of rank {rank}\n{self.said()}")

    def ends(self) -> list[tuple[str, str]]:
        """How the attempts ended: cause and words."""
        return [(line.cause, line.words) for line in self.run.ledger.read().of(Ended)]

    def audit(self) -> dict[int, list[str]]:
        """Keys by step; where two attempts hold one step, the later one counts."""
        return {
            step: taken.keys
            for (_, step), taken in sorted(audit_of_attempts(self.run.path).items(), key=lambda item: item[0])
        }

    def said(self) -> str:
        """All that is known, for a test that fails."""
        logs = [*sorted(self.run.slurm.glob("*.log")), *sorted(self.run.logs.glob("*/rank-00000.log"))[-2:]]
        history = self.run.ledger.read()
        events = [str(event)[:300] for event in history.events if not isinstance(event, Evaluated)]
        return "\n".join(
            [
                *events[-30:],
                *(f"--- {log}\n{log.read_text(errors='replace', encoding='utf-8')[-1500:]}" for log in logs),
                *self.jobs(),
            ]
        )


def make_chain(
    cluster: Cluster, folder: Path, model: Path, shards: str, steps: int, **sections: dict[str, object]
) -> Chain:
    """A run that is not submitted yet; its shards are indexed."""
    (folder / "faults").mkdir(parents=True)
    setup = [f"export PYTHONPATH='{FAULTS}' EARWITNESS_FAULTS='{folder}/faults'"]
    slurm = {
        "nodes": 2,
        "gpus_per_node": 0,
        "tasks_per_node": 2,
        "signal_seconds": 20,
        "time_minutes": 30,
        "setup": setup,
        **sections.pop("slurm", {}),
    }
    values = config_values(
        "run",
        folder,
        model,
        shards,
        **{
            "optim": {"max_steps": steps},
            "evaluate": {"captions": 0, "scored": 0, "every_steps": 10_000},
            "checkpoint": {"every_steps": 2},
            "monitor": {"every_steps": 1},
            "engine": {"backend": "fsdp2", "dtype": "fp32"},
            **sections,
            "slurm": slurm,
        },
    )
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = run_program("tools.index", config)
    assert done.returncode == 0, done.stderr
    return Chain(cluster, config, RunDir(folder / "run"), folder / "faults")
