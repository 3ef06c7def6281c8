"""GPUs of this machine that a run may take, without the seconds that importing torch takes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/gpus")


def visible_gpus() -> int:
    """How many this process may use."""
    listed, present = os.environ.get("CUDA_VISIBLE_DEVICES"), _present()
    return len(present) if listed is None else count_visible(listed, present)


def count_visible(listed: str, present: Sequence[str]) -> int:
    """How many GPUs CUDA sees. listed: as in CUDA_VISIBLE_DEVICES; present: UUIDs of those that there are,
    empty if it is not known.

    As CUDA reads it: numbers or (beginnings of) UUIDs up to the first one that is none of a GPU; of parts of
    GPUs (MIG) only the first one, and none at all if one comes twice.
    """
    taken: list[str] = []
    for entry in map(str.strip, listed.split(",")):
        if entry.startswith("MIG-"):
            return len(taken) or 1
        gpu = _gpu(entry, present)
        if gpu is None:
            break
        if gpu in taken:
            return 0
        taken.append(gpu)
    return len(taken)


def _gpu(entry: str, present: Sequence[str]) -> str | None:
    """The GPU that an entry stands for; None if there is none."""
    if entry.startswith("GPU-"):
        fitting = [uuid for uuid in present if uuid.startswith(entry)]
        return (fitting[0] if len(fitting) == 1 else None) if present else entry
    number = re.match(r"\+?\d+", entry)
    if number is None or (present and int(number[0]) >= len(present)):
        return None
    return present[int(number[0])] if present else str(int(number[0]))


def _present() -> list[str]:
    """UUIDs of the GPUs that the driver has, or, where it does not say, their places."""
    uuids = []
    for folder in sorted(DRIVER.glob("*")):
        try:
            said = (folder / "information").read_text(encoding="utf-8", errors="replace")
        except OSError:
            said = ""
        uuid = re.search(r"GPU UUID:\s*(GPU-[\w-]+)", said)
        uuids.append(uuid[1] if uuid else folder.name)
    return uuids
