"""A run that is submitted once goes on through all that a cluster does to its jobs, on a real Slurm, and is
the same run at the end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs.run.events import AttemptBegan, CheckpointSaved
from tests.cluster.chains import Chain, make_chain
from tests.forks import Launcher
from tests.making import audit
from tools.sandbox import slurm
from tools.sandbox.slurm import Cluster

ENDLESS = 100_000
"""Steps, so that no machine is too fast for what is done to a run."""


def preempt(chain: Chain) -> None:
    chain.cluster.run(
        "sbatch",
        "--partition=high",
        "--nodes=4",
        "--exclusive",
        "--mem=1",
        "--output=/dev/null",
        "--wrap=sleep 1",
    )


def time_limit(chain: Chain) -> None:
    """The limit of the job at work comes within the minute."""
    elapsed = int(time.time() - chain.run.ledger.read().of(AttemptBegan)[-1].time)
    chain.cluster.run(
        "scontrol",
        "update",
        f"JobId={chain.job()}",
        f"TimeLimit=00:{elapsed // 60:02d}:{elapsed % 60 + 25:02d}",
    )


def kill_rank(chain: Chain) -> None:
    os.kill(chain.pid(2), signal.SIGKILL)


def stop_rank(chain: Chain) -> None:
    os.kill(chain.pid(3), signal.SIGSTOP)


def raise_in_rank(error: str) -> Callable[[Chain], None]:
    return lambda chain: (chain.faults / "rank-1").write_text(error, encoding="utf-8") and None


def lose_node(chain: Chain) -> None:
    chain.cluster.kill_node(chain.nodes()[-1])


def lose_first_node(chain: Chain) -> None:
    chain.cluster.kill_node(chain.nodes()[0])


def lose_slurmd(chain: Chain) -> None:
    chain.cluster.kill_slurmd(chain.nodes()[-1])


def lost(nodes: list[str], cluster: Cluster) -> list[str]:
    """Those of some nodes that Slurm has lost."""
    states = dict(
        line.split()
        for line in cluster.run(
            "sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %t"
        ).splitlines()
    )
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
def test_whatever_happens_it_goes_on_and_is_the_same_run(
    fragile: Cluster, tmp_path: Path, model: Path, shards: str, launch
) -> None:
    """Every way in which an attempt can end, one after another, in a chain from a shell full of what others
    have left; seconds from each fault to the first new step are printed."""
    chain = make_chain(
        fragile,
        tmp_path,
        model,
        shards,
        ENDLESS,
        slurm={"hang_seconds": 8, "exclude_minutes": 0, "notify": "me@example.org"},
    )
    chain.submit()
    attempt = chain.training()
    for name, (happen, cause, words) in ENDINGS.items():
        nodes, began = chain.nodes(), time.time()
        happen(chain)
        attempt = chain.training(attempt, steps=1)
        stepped, restarted, end = (
            time.time() - began,
            chain.run.ledger.read().of(AttemptBegan)[-1].time - began,
            chain.ends()[-1],
        )
        print(
            f"{name:30} next attempt after {restarted:5.1f} s, its first step after {stepped:5.1f} s "
            f" {end[1]}",
            flush=True,
        )
        assert end[0] == cause and words in end[1], chain.said()
        for node in lost(nodes, fragile):
            fragile.start_slurmd(node)
        chain.training(attempt - 1)
    assert not fragile.mail
    check_the_same(chain, launch)
    # The last one of each chain.
    jobs = {line.chain: line.job for line in chain.run.ledger.read().of(AttemptBegan)}
    chain.wait("a mail for each of the two chains", lambda: len(fragile.mail) >= len(jobs))
    assert len(jobs) == len(fragile.mail) == 2
    for job, mail in zip(jobs.values(), fragile.mail, strict=True):
        assert mail.startswith(f"to me@example.org: Slurm Job_id={job} Name=run "), mail
    done = chain.launch("status", chain.run.path, "--json")
    assert done.returncode == 0 and len(json.loads(done.stdout)["attempts"]) == len(ENDINGS) + 2


def check_the_same(chain: Chain, launch: Launcher) -> None:
    """Stop a run, let it take a few more steps, and compare it with one that nothing happened to."""
    stop(chain)
    finish_and_compare(chain, launch)


def stop(chain: Chain) -> None:
    done = chain.launch("stop", chain.run.path)
    assert done.returncode == 0 and "the chain has ended" in done.stdout, done.stderr
    assert chain.ends()[-1] == ("stopped", "stopped by `launch stop`")


def finish_and_compare(chain: Chain, launch: Launcher) -> None:
    last = 3 + max(line.step for line in chain.run.ledger.read().of(CheckpointSaved))
    chain.submit(f"optim.max_steps={last}")
    assert chain.finished() == "finished"
    folder = chain.config.parent / "expected"
    only_steps = [f"optim.max_steps={last}", f"checkpoint.every_steps={ENDLESS}"]
    # On two ranks with a thread each: two threads of one rank wait for each other where cores are shared.
    done = launch(chain.config, f"run.dir={folder}", *only_steps, procs=2)
    assert done.returncode == 0, done.stderr
    assert chain.audit() == audit(folder)
