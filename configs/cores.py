"""CPU cores: how many a rank has, and what decoding does with them."""

from __future__ import annotations

import os

from configs.schema import Data

CLIP_CPU_SECONDS = 0.045
"""Seconds of CPU that 30 s of stereo FLAC cost, from the bytes to samples at 16 kHz."""
CARD_CLIPS = 59
"""Clips of 30 s that an H100 takes per second in whisper-large-v3-turbo, at a good MFU (42 %)."""
MOST_THREADS = 8
"""Decoding threads of a rank unless more are asked for: three times what such a card takes."""


def cores_of_rank() -> int:
    """Cores that this process has: those that it is bound to, but no more than its share of the node's, or of
    the job's on this node, as where Slurm binds nothing all its ranks may use the same ones."""
    ranks_of_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores_of_node = os.cpu_count() or 1
    cores_of_job = int(os.environ.get("SLURM_CPUS_ON_NODE", cores_of_node))
    share = min(cores_of_node, cores_of_job) // ranks_of_node
    return max(1, min(len(os.sched_getaffinity(0)), share))


def decoding_threads(data: Data, cores: int | None = None) -> int:
    """Threads of a rank that decode: `data.threads`, or as many as it has cores beside that of its main
    thread. cores: of the rank; default those of this process."""
    if data.threads is not None:
        return data.threads
    beside_main = (cores or cores_of_rank()) - 1
    return min(MOST_THREADS, max(1, beside_main))


def remark_on_cores(data: Data, cores: int) -> str:
    """What to say where a rank with a GPU has too few cores to feed it; empty where it has enough."""
    threads = decoding_threads(data, cores)
    busy_cores = min(threads, cores)
    clips = busy_cores / CLIP_CPU_SECONDS
    if clips >= CARD_CLIPS:
        return ""
    return (
        f"decoding threads: {threads}, on {cores} cores for each process. They feed about {clips:.0f} clips"
        f" of 30 s per second (stereo FLAC), and a fast GPU takes {CARD_CLIPS}: it may wait for data. More"
        " cores: slurm.cpus_per_task; more threads: data.threads"
    )
