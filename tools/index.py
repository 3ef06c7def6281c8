"""`python -m tools.index SHARDS...` or `python -m tools.index CONFIG`: read every sample of every shard
once, off the GPUs."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

import pyarrow.compute as pc
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from configs.errors import ConfigError, DataError, EarwitnessError, run_command
from data.ffmpeg import ffmpeg_would_win, has_ffmpeg, needs_ffmpeg
from data.index import Sidecar, ignored_in_words, index_shard, load_sidecar, sidecar_location
from data.retry import STATS
from data.sources import Shard, expand
from data.storage import find
from tools.arguments import CaptionKeys, ShardsOrConfig, StorageOptions, Threads, named_data

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

MOST_UNREADABLE = 20
"""Shards that may be unreadable; after one more it is no use to go on."""


def index(
    shards: ShardsOrConfig,
    quick: Annotated[
        bool, typer.Option("--quick", help="Headers only: no CRC32, no seconds, no look at the content.")
    ] = False,
    caption_key: CaptionKeys = None,
    index_dir: Annotated[
        str | None, typer.Option(help="Where the indexes go (for SHARDS).", show_default="index")
    ] = None,
    storage_options: StorageOptions = None,
    threads: Threads = 8,
) -> None:
    """Index shards, and name every problem. What is there already and current is not done again. In a Slurm
    array each job takes its share."""
    data, config = named_data(shards, caption_key, index_dir, storage_options)
    all_shards = [shard for source in data.sources for shard in expand(source)]
    share = _share(all_shards)
    began = time.monotonic()
    totals, unreadable = _index_all(share, data.index_dir, threads, full=not quick)
    hours = "" if quick else f", {totals.seconds / 3600:.2f} h"
    print(
        f"{data.index_dir}: {len(share)} shards, {totals.samples} samples{hours}, {totals.problems} with a"
        f" problem, {totals.damaged} shards damaged"
    )
    if totals.for_ffmpeg:
        print(f"{totals.for_ffmpeg:,} of these problems {ffmpeg_would_win(totals.for_ffmpeg)}")
    if STATS["requests"]:
        print(
            f"read from elsewhere: {STATS['bytes'] / 1e9:.3f} GB in {STATS['requests']:,} requests,"
            f" {time.monotonic() - began:.0f} s"
        )
    if unreadable:
        raise type(unreadable[0])("\n".join(map(str, unreadable)))
    if totals.samples == 0 and len(share) == len(all_shards):
        question = " (is --caption-key right?)" if config is None else ""
        raise DataError(f"no sample can be used; the reasons are above{question}")


@dataclass
class _Totals:
    """What the indexes of all shards say."""

    samples: int = 0
    """Samples that can be used."""
    seconds: float = 0.0
    """Audio in them; 0 without a full index."""
    problems: int = 0
    """Samples that cannot be used."""
    for_ffmpeg: int = 0
    """Those among them that only FFmpeg could read."""
    damaged: int = 0
    """Shards that could not be read to their end."""


def _share(shards: list[Shard]) -> list[Shard]:
    """All shards, or those of this job of a Slurm array."""

    def number(name: str, default: int) -> int:
        return int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))

    jobs = range(number("MIN", 0), number("MAX", 0) + 1, number("STEP", 1))
    if number("COUNT", len(jobs)) != len(jobs):
        raise ConfigError(
            "give the jobs of the array evenly spaced numbers, as --array=0-7: each takes its share by them"
        )
    return shards[jobs.index(number("ID", 0)) :: len(jobs)]


def _index_all(
    shards: list[Shard], index_dir: str, threads: int, *, full: bool
) -> tuple[_Totals, list[EarwitnessError]]:
    """Index shards, each as soon as a thread is free, and name the problems in the order of the shards.

    Returns the totals and, of shards that cannot be read, the errors; raises the error if there are too many.
    """
    totals = _Totals()
    unreadable: list[EarwitnessError] = []
    console = Console(stderr=True)
    with (
        ThreadPoolExecutor(threads) as pool,
        Progress(*COLUMNS, console=console, disable=not sys.stderr.isatty()) as progress,
    ):
        outcomes = pool.map(lambda shard: _current_index(shard, index_dir, full=full), shards)
        try:
            for shard, outcome in zip(progress.track(shards, description="shards"), outcomes, strict=True):
                if isinstance(outcome, Sidecar):
                    _report(shard, outcome, totals)
                elif len(unreadable) < MOST_UNREADABLE:
                    unreadable.append(outcome)
                else:
                    raise outcome
        except KeyboardInterrupt:
            progress.stop()
            print("stopped; what is indexed stays, and the same command goes on", file=sys.stderr, flush=True)
            os._exit(130)  # the threads would read their shards to the end first
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return totals, unreadable


def _current_index(shard: Shard, index_dir: str, *, full: bool) -> Sidecar | EarwitnessError:
    """The index of a shard as the shard is now, made anew where there is none; or why there can be none."""
    try:
        sidecar = load_sidecar(shard, index_dir)
        if sidecar is None and find(sidecar_location(shard, index_dir)):
            print(f"{shard.location.url}: changed since it was indexed; it is indexed anew", flush=True)
        if sidecar is not None and (sidecar.full or not full):
            if not (full and has_ffmpeg() and _needed_ffmpeg(sidecar)):
                return sidecar
            print(f"{shard.location.url}: samples of it needed FFmpeg, which is here now; it is indexed anew")
        return index_shard(shard, index_dir, full=full)
    except EarwitnessError as error:
        return error


def _needed_ffmpeg(sidecar: Sidecar) -> bool:
    """Whether there was no FFmpeg when this index was made, for a sample that needs it."""
    return any(map(needs_ffmpeg, pc.unique(sidecar.table["problem"]).to_pylist()))


def _report(shard: Shard, sidecar: Sidecar, totals: _Totals) -> None:
    """Name the problems of a shard, each once, and add what it holds to the totals."""
    keys_of_problem: dict[str, list[str]] = {}
    for row in sidecar.table.select(["key", "seconds", "problem"]).to_pylist():
        if row["problem"]:
            keys_of_problem.setdefault(row["problem"], []).append(row["key"])
            totals.problems += 1
            totals.for_ffmpeg += needs_ffmpeg(row["problem"])
        else:
            totals.samples += 1
            totals.seconds += row["seconds"] if sidecar.full else 0
    for problem, keys in keys_of_problem.items():
        others = f"; and {len(keys) - 1:,} others" if len(keys) > 1 else ""
        print(f"{shard.location.url}: {keys[0]}: {problem}{others}")
    if not len(sidecar.table) and not sidecar.damage:
        print(f"{shard.location.url}: no samples, {ignored_in_words(sidecar.ignored)}")
    if sidecar.damage:
        print(f"{shard.location.url}: {sidecar.loss()}")
        totals.damaged += 1


if __name__ == "__main__":
    run_command(lambda: typer.run(index))
