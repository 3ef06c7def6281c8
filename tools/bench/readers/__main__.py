"""`python -m tools.bench.readers READER TASK CLIPS FIRST`: measure a reader, and print figures as JSON.

TASK is a Task in JSON, CLIPS the number of clips, FIRST the file of the clip with the key 000000. A first
pass over the clips does not count; the second one is measured. So as much has been read ahead when the
measurement begins as when it ends.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import torch

from tools.bench.readers import BATCH, Preparation, Ready, Task, decode

FIRST_KEY = "000000"


def _cpu() -> float:
    """CPU seconds of this process and of those that it has started and waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(reader: str, task: Task, clips: int, first: bytes) -> dict[str, float]:
    """Measure a reader. clips: a multiple of BATCH; first: content of the clip with the key FIRST_KEY."""
    torch.set_num_threads(1)
    module = importlib.import_module(f"tools.bench.readers.{reader}")
    reference = Preparation(task.model)([decode(first)], [""], [""]).features[0]
    began = time.perf_counter()
    batches = module.read(task)
    batch = next(batches)
    first_seconds = time.perf_counter() - began
    keys: list[str] = []
    difference = math.nan
    while True:
        keys += batch.keys
        if FIRST_KEY in batch.keys:
            difference = _difference(batch, reference)
        if len(keys) >= clips:
            break
        batch = next(batches)
    began, cpu_began = time.perf_counter(), _cpu()
    for _ in range(clips // BATCH):
        next(batches)
    cpu, wall = _cpu() - cpu_began, time.perf_counter() - began
    return {
        "samples_per_core_second": clips / cpu,
        "cpu_milliseconds_per_sample": 1000 * cpu / clips,
        "samples_per_second": clips / wall,
        "first_batch_seconds": first_seconds,
        "distinct_samples": len(set(keys[:clips])),
        "largest_mel_difference": difference,
    }


def _difference(batch: Ready, reference: torch.Tensor) -> float:
    """Largest difference between the features of the clip FIRST_KEY and the reference, (MELS, 3000); NaN
    where the batch has waveforms instead."""
    if batch.features.ndim != 1 + reference.ndim:
        return math.nan
    features = batch.features[list(batch.keys).index(FIRST_KEY)]
    return float((features - reference).abs().max())


if __name__ == "__main__":
    reader, task, clips, first = sys.argv[1:]
    figures = measure(reader, Task(**json.loads(task)), int(clips), Path(first).read_bytes())
    print(json.dumps(figures), flush=True)
    os._exit(0)  # reads that are under way are not waited for
