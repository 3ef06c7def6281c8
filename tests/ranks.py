"""Ranks for tests: `python -m tests.ranks PROCS RUN...` trains several runs one after another in one set of processes.

Starting processes and importing torch takes 10 s, training a small model less than one.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import yaml

from tests.making import ROOT


class Never:
    """No stop is requested."""

    requested = False


def rank_main(runs: list[str]) -> None:
    import torch

    from configs.rundir import RunDir
    from trainer import distributed
    from trainer.loop import train
    from trainer.session import prepare

    torch.set_num_threads(1)
    world = distributed.start()
    for path in runs:
        run = RunDir(path)
        train(prepare(run.read_config(), run, 0, world), Never())
        world.barrier()
    distributed.end()


def train_runs(procs: int, configs: list[dict]) -> list[Path]:
    """Train runs with `procs` ranks; returns their folders."""
    folders = []
    for values in configs:
        folder = Path(values["run"]["dir"])
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        folders.append(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(procs):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": procs, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "tests.ranks", *map(str, folders)]
        started.append(subprocess.Popen(command, cwd=ROOT, env=_environment(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=600)[0] for process in started]
    for process, output in zip(started, said, strict=True):
        assert process.returncode == 0, output[-4000:]
    return folders


def _environment(more: dict[str, object]) -> dict[str, str]:
    import os

    return {**os.environ, **{name: str(value) for name, value in more.items()}}


if __name__ == "__main__":
    rank_main(sys.argv[1:])
