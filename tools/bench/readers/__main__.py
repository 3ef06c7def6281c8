"""`python -m tools.bench.readers READER TASK CLIPS FIRST`: measure a reader, and print what was found as
JSON.

TASK is a Task in JSON, CLIPS how many there are, FIRST the file of the one with the key 000000. A first pass
is left out, so that what is read ahead is so at the beginning as at the end of the second pass, which is
measured.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch

from tools.bench.readers import BATCH, Preparation, Task, decode


def _cpu() -> float:
    """CPU seconds of this process and of those that it has started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(reader: str, task: Task, clips: int, first: bytes) -> dict[str, float]:
    """Figures of a reader."""
    torch.set_num_threads(1)
    module, reference = (
        importlib.import_module(f"tools.bench.readers.{reader}"),
        Preparation(task.model)([decode(first)], [""], [""]),
    )
    began = time.perf_counter()
    batches = module.read(task)
    ready = next(batches)
    first_seconds, keys, difference = time.perf_counter() - began, [], torch.tensor(float("nan"))
    while True:
        keys += ready.keys
        if "000000" in ready.keys and ready.features.ndim == reference.features.ndim:
            difference = (
                (ready.features[list(ready.keys).index("000000")] - reference.features[0]).abs().max()
            )
        if len(keys) >= clips:
            break
        ready = next(batches)
    began, cpu = time.perf_counter(), _cpu()
    for _ in range(clips // BATCH):
        next(batches)
    cpu, wall = _cpu() - cpu, time.perf_counter() - began
    return {
        "samples_per_core_second": clips / cpu,
        "cpu_milliseconds_per_sample": 1000 * cpu / clips,
        "samples_per_second": clips / wall,
        "first_batch_seconds": first_seconds,
        "distinct_samples": len(set(keys[:clips])),
        "largest_mel_difference": float(difference),
    }


if __name__ == "__main__":
    name, task, clips, first = sys.argv[1:]
    found = measure(name, Task(**json.loads(task)), int(clips), Path(first).read_bytes())
    print(json.dumps(found), flush=True)
    os._exit(0)  # reads that are under way are not waited for
