"""A run that is submitted once goes on through all that a cluster does to its jobs, on a real Slurm, and is the same run at the end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.chains import Chain, make_chain
from tests.making import audit, config_values
from tools.sandbox import slurm
from tools.sandbox.slurm import Cluster

STEPS = 160


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, model: Path, shards: str, launch) -> dict[int, list[str]]:
    """Keys by step of the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("expected")
    done = launch(config_values("run", folder, model, shards, optim={"max_steps": STEPS}, evaluate={"captions": 0}, engine={"backend": "fsdp2"}))
    assert done.returncode == 0, done.stderr
    return audit(folder / "run")


def preempt(chain: Chain) -> None:
    chain.cluster.run("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")


def time_limit(chain: Chain) -> None:
    """The limit of the job at work comes within the minute."""
    elapsed = int(time.time() - chain.run.ledger("attempt")[-1]["time"])
    chain.cluster.run("scontrol", "update", f"JobId={chain.job()}", f"TimeLimit=00:{elapsed // 60:02d}:{elapsed % 60 + 25:02d}")


def kill_rank(chain: Chain) -> None:
    os.kill(chain.pid(2), signal.SIGKILL)


def stop_rank(chain: Chain) -> None:
    os.kill(chain.pid(3), signal.SIGSTOP)


def raise_in_rank(error: str) -> Callable[[Chain], None]:
    return lambda chain: (chain.faults / "rank-1").write_text(error) and None


def lose_node(chain: Chain) -> None:
    chain.cluster.kill_node(chain.nodes()[-1])


def lose_first_node(chain: Chain) -> None:
    chain.cluster.kill_node(chain.nodes()[0])


def lose_slurmd(chain: Chain) -> None:
    chain.cluster.kill_slurmd(chain.nodes()[-1])


def lost(nodes: list[str], cluster: Cluster) -> list[str]:
    """Those of some nodes that Slurm has lost."""
    states = dict(line.split() for line in cluster.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %t").splitlines())
    return [node for node in nodes if "down" in states[node]]


ENDINGS: dict[str, tuple[Callable[[Chain], None], str, str]] = {
    "preempted": (preempt, "preempted", "saved at step"),
    "a rank killed": (kill_rank, "crash", "Killed"),
    "an exception": (raise_in_rank("ZeroDivisionError"), "error", "rank 1: ZeroDivisionError"),
    "out of memory": (raise_in_rank("MemoryError"), "out_of_memory", "too little memory"),
    "hang": (stop_rank, "hang", "rank 3 gave no sign of life"),
    "node lost": (lose_node, "node_lost", ""),
    "node of the batch step lost": (lose_first_node, "node_lost", ""),
    "slurmd lost": (lose_slurmd, "node_lost", ""),
    "time limit": (time_limit, "time_limit", "saved at step"),
}


@pytest.fixture
def fragile(slurm_packages: None, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster that notices in seconds that a node is gone."""
    with slurm.serve(tmp_path / "slurm", extra=["SlurmdTimeout=4", "MessageTimeout=2"]) as cluster:
        yield cluster


@pytest.mark.slow
def test_whatever_happens_it_goes_on_and_is_the_same_run(fragile: Cluster, tmp_path: Path, model: Path, shards: str, expected) -> None:
    """Every way in which an attempt can end, one after another; seconds from each fault to the first new step are printed."""
    chain = make_chain(fragile, tmp_path, model, shards, STEPS, slurm={"hang_seconds": 8, "nodes": 2, "max_attempts_without_progress": 2, "exclude_minutes": 0})
    chain.submit()
    attempt, table = chain.training(), []
    for name, (happen, cause, words) in ENDINGS.items():
        nodes = chain.nodes()
        began = time.time()
        happen(chain)
        attempt = chain.training(attempt, steps=1)
        table.append((name, time.time() - began, *chain.ends()[-1]))
        print(f"{name:30} {table[-1][1]:6.1f} s  {table[-1][3]}", flush=True)
        assert chain.ends()[-1][0] == cause, chain.said()
        assert words in chain.ends()[-1][1], chain.said()
        for node in lost(nodes, fragile):
            fragile.start_slurmd(node)
        chain.training(attempt - 1)
    assert chain.finished() == "finished"
    assert chain.audit() == expected
    done = chain.launch("status", chain.run.path, "--json")
    assert done.returncode == 0 and len(json.loads(done.stdout)["attempts"]) == len(ENDINGS) + 1
