"""What is good to know before a run is submitted, in lines."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.cores import remark_on_cores
from configs.run.events import CheckpointSaved
from configs.run.folder import RunDir
from configs.schema import RunConfig
from data.balance import remark_on_balance
from slurm.submit import cores_per_task

if TYPE_CHECKING:
    from trainer.examine import Pretrained

BYTES_PER_PARAMETER = 12
"""Of a checkpoint: master weight and two moments."""
PROBE_BYTES = 64 << 20
LOCAL_SYSTEMS = {"tmpfs", "ramfs", "overlay", "ext4", "ext3", "xfs", "btrfs"}
"""File systems that other machines do not see."""


def remarks(config: RunConfig, run: RunDir, base: Pretrained | None) -> Iterator[str]:
    """All of them. base: the model to start from, of a run without checkpoints."""
    yield from on_samples(config)
    yield from on_cores(config)
    yield from _on_checkpoints(config, run, base)
    yield from _on_folder(run)


def on_samples(config: RunConfig) -> Iterator[str]:
    """How many samples each process gets, and whether they are enough to even out their work."""
    yield _samples_of_each(config)
    _, most = config.slurm.processes
    remark = remark_on_balance(config, most)
    if remark:
        yield f"note: {remark}"


def on_cores(config: RunConfig) -> Iterator[str]:
    """How many cores each process gets, and whether they feed its GPU."""
    if not config.slurm.gpus_per_node:
        return
    cores = cores_per_task(config.slurm)
    if cores is None:
        yield (
            "note: Slurm does not say how many cores the nodes have, and each process gets the cluster's"
            " default, often one: set slurm.cpus_per_task"
        )
        return
    yield f"cores for each process: {cores} (slurm.cpus_per_task)"
    remark = remark_on_cores(config.data, cores)
    if remark:
        yield f"note: {remark}"


def _samples_of_each(config: RunConfig) -> str:
    size = config.batch.global_size
    fewest, most = config.slurm.processes
    processes, samples = f"{fewest}", f"{ceil(size / fewest)}"
    if most > fewest:
        processes += f" to {most}"
        samples += f" to {ceil(size / most)}"
    divides_evenly = size % fewest == 0 and size % most == 0
    uneven = "" if divides_evenly else ", some one less"
    return f"a step of {size} samples over {processes} processes: {samples} samples each{uneven}"


def _on_checkpoints(config: RunConfig, run: RunDir, base: Pretrained | None) -> Iterator[str]:
    """How large a checkpoint will be, and whether one can be written in the time that a signal leaves."""
    saved = run.ledger.read().last(CheckpointSaved)
    if saved:
        size = saved.bytes
    elif base:
        size = BYTES_PER_PARAMETER * _trained(base.config, config.model.freeze)
    else:
        return
    fewest, _ = config.slurm.processes
    yield (
        f"a checkpoint has {size / 1e9:.2f} GB in {fewest} or more files; kept: the last"
        f" {config.checkpoint.keep_last} and the best"
    )
    if saved:
        seconds, whose = saved.total_seconds, "the last one took"
    else:
        seconds, whose = size / _write_speed(run), "one process would take"
    took = f"{seconds:.0f} s" if seconds >= 1 else "less than 1 s"
    grace = config.slurm.signal_seconds
    is_slow = seconds > grace / 2
    advice = f". That is more than half of slurm.signal_seconds={grace}: raise it" if is_slow else ""
    yield f"saving: {whose} {took}{advice}"
    free = shutil.disk_usage(run.path).free
    if free < size * (config.checkpoint.keep_last + 2):
        yield f"only {free / 1e9:.1f} GB are free on the file system of {run.path}"


def _trained(model: Any, frozen: Sequence[str]) -> int:
    """How many parameters are trained of a model of such a config. frozen: as `model.freeze`."""
    from trainer.model import outline  # seconds, which the command line has spent by now

    parameters = outline(model, frozen).parameters()
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def _write_speed(run: RunDir) -> float:
    """Bytes per second that this machine writes into the run's folder."""
    probe, block = run.slurm / "probe", os.urandom(1 << 20)
    began = time.perf_counter()
    with contextlib.closing(probe.open("wb", buffering=0)) as file:
        for _ in range(PROBE_BYTES >> 20):
            file.write(block)
        os.fsync(file.fileno())
    probe.unlink()
    return PROBE_BYTES / (time.perf_counter() - began)


def _on_folder(run: RunDir) -> Iterator[str]:
    """Say if other machines may not see the run's folder; each attempt looks before it starts."""
    path = run.path.absolute()
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    system_at = {place: system for place, system in mounts if path.is_relative_to(place)}
    place = max(system_at, key=len)
    if system_at[place] in LOCAL_SYSTEMS:
        yield (
            f"{path} is on {system_at[place]} ({place}), which looks like this machine's own disk: all"
            " compute nodes must see it under this path"
        )
