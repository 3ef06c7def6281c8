"""Which device a rank takes, and whether others have it already."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import torch

from configs.errors import ConfigError, UnfitNode

TAKEN = re.compile(r"busy or unavailable|out of memory", re.IGNORECASE)
"""In what CUDA says (RuntimeError) of a GPU that another process has for itself, or has filled."""
LEAST_FREE = 0.1
"""Share of a GPU's memory with which training is begun: with less, not even CUDA's libraries and a small
Whisper have room on a common card."""


def choose_device(local_rank: int, node: str, gpus_per_node: int | None) -> torch.device:
    """The device that a rank takes.

    gpus_per_node: how many GPUs a job has asked for on each node, 0 for the CPU; None outside of a job.
    Raises UnfitNode if too few of them answer here, ConfigError if this machine has too few.
    """
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus_per_node is None:
        return _device_outside_of_jobs(local_rank, visible)
    if gpus_per_node == 0:
        return torch.device("cpu")
    if visible == 1:
        return torch.device("cuda", 0)  # sites may bind a GPU to each task, which then sees no other one
    if local_rank >= visible:
        raise UnfitNode(node, f"{node}: only {visible} of {gpus_per_node} GPUs answer")
    return torch.device("cuda", local_rank)


def _device_outside_of_jobs(local_rank: int, visible: int) -> torch.device:
    if visible == 0:
        return torch.device("cpu")
    if local_rank >= visible:
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        by_whom = "" if listed is None else f", by CUDA_VISIBLE_DEVICES={listed}"
        raise ConfigError(
            f"this machine has {visible} GPUs{by_whom}, and each process needs one: --procs {visible}, or set"
            " CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return torch.device("cuda", local_rank)


def take(device: torch.device, node: str | None) -> None:
    """Take a GPU for this process; the CPU needs no taking. node: of the job that it is in, None outside of
    jobs.

    Raises UnfitNode in a job and ConfigError elsewhere for a GPU that others have taken, ConfigError for one
    without BF16.
    """
    if device.type != "cuda":
        return

    def memory() -> tuple[int, int]:
        torch.cuda.set_device(device)
        return torch.cuda.mem_get_info(device)

    trouble = trouble_with(memory)
    if trouble and node is not None:
        raise UnfitNode(node, f"{node}: {_name(device)}: {trouble}")
    if trouble:
        every_one = ",".join(map(str, range(torch.cuda.device_count())))
        listed = os.environ.get("CUDA_VISIBLE_DEVICES", every_one)
        raise ConfigError(
            f"{_name(device)}: {trouble}. `nvidia-smi` shows whose they are. Wait for their end, or"
            f" {leave_out(listed, device.index)}"
        )
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"{name_of(device)}: this GPU has no BF16 arithmetic, which training uses; take one of the Ampere"
            " generation or newer (A100, H100)"
        )


def trouble_with(memory: Callable[[], tuple[int, int]]) -> str:
    """What keeps a GPU from being used; empty if nothing does. memory: free and total bytes of it, as torch
    says, which raises RuntimeError for one that it does not get."""
    try:
        free, total = memory()
    except RuntimeError as error:
        if TAKEN.search(str(error)):
            what = str(error).splitlines()[0]
            return f"other processes have it, for themselves (exclusive mode) or filled up ({what})"
        raise
    if free < LEAST_FREE * total:
        return f"only {free / 1e9:.1f} of {total / 1e9:.1f} GB are free, other processes have the rest"
    return ""


def leave_out(listed: str, number: int) -> str:
    """How to train without one of the GPUs. listed: as in CUDA_VISIBLE_DEVICES; number: its place there."""
    entries = listed.split(",")
    others = ",".join(entries[:number] + entries[number + 1 :])
    if not others:
        return "train on another machine, or with CUDA_VISIBLE_DEVICES= on the CPU"
    return f"leave it out: CUDA_VISIBLE_DEVICES={others}"


def name_of(device: torch.device) -> str:
    """What a device is called: `NVIDIA H100 80GB HBM3`, `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _name(device: torch.device) -> str:
    return f"GPU {device.index} ({name_of(device)})"
