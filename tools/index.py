"""`python -m tools.index SHARDS...` or `python -m tools.index CONFIG`: find every sample of every shard,
once, off the GPUs."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from configs.errors import ConfigError, DataError, EarwitnessError, run_command
from data.index import Sidecar, index_shard, load_sidecar, sidecar_location
from data.retry import STATS
from data.sources import Shard, expand
from data.storage import find
from tools.arguments import named_data

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

MOST_UNREADABLE = 20
"""Shards after which it is no use to go on."""


def index(
    shards: Annotated[
        list[str],
        typer.Argument(
            help="Shards (paths, URLs, globs, braces), or one config: all its sources.",
            metavar="SHARDS...|CONFIG",
        ),
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Headers only: no CRC32, no seconds, no look at the content.")
    ] = False,
    caption_key: Annotated[str, typer.Option(help="Where the caption is (for SHARDS).")] = "caption",
    index_dir: Annotated[
        str | None, typer.Option(help="Where the indexes go (for SHARDS).", show_default="index")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Shards at a time.")] = 8,
) -> None:
    """Index shards, and name every problem. What is there already and current is not done again. In a Slurm
    array each job takes its share."""
    data, config = named_data(shards, caption_key, index_dir)
    everything = [shard for source in data.sources for shard in expand(source)]
    todo = _share(everything)
    totals: Counter[str] = Counter()
    unreadable: list[EarwitnessError] = []
    began = time.monotonic()
    with (
        ThreadPoolExecutor(threads) as pool,
        Progress(*COLUMNS, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
    ):
        found = pool.map(lambda shard: _current(shard, data.index_dir, full=not quick), todo)
        try:
            for shard, sidecar in zip(progress.track(todo, description="shards"), found, strict=True):
                if isinstance(sidecar, Sidecar):
                    totals += _report(shard, sidecar)
                elif len(unreadable) < MOST_UNREADABLE:
                    unreadable.append(sidecar)
                else:
                    raise sidecar
        except KeyboardInterrupt:
            progress.stop()
            print("stopped; what is indexed stays, and the same command goes on", file=sys.stderr, flush=True)
            os._exit(130)  # the threads would read their shards to the end first
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    hours = "" if quick else f", {totals['seconds'] / 3600:.2f} h"
    print(
        f"{data.index_dir}: {len(todo)} shards, {totals['samples']} samples{hours}, {totals['problems']} with"
        f" a problem, {totals['damaged']} shards damaged"
    )
    if STATS["requests"]:
        print(
            f"read from elsewhere: {STATS['bytes'] / 1e9:.3f} GB in {STATS['requests']:,} requests,"
            f" {time.monotonic() - began:.0f} s"
        )
    if unreadable:
        raise type(unreadable[0])("\n".join(map(str, unreadable)))
    if not totals["samples"] and len(todo) == len(everything):
        raise DataError(
            "no sample can be used; the reasons are above" + " (is --caption-key right?)" * (config is None)
        )


def _share(shards: list[Shard]) -> list[Shard]:
    """All shards, or those of this job of a Slurm array."""
    first, last, step, number = (
        int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("MIN", 0), ("MAX", 0), ("STEP", 1), ("ID", 0))
    )
    jobs = range(first, last + 1, step)
    if len(jobs) != int(os.environ.get("SLURM_ARRAY_TASK_COUNT", len(jobs))):
        raise ConfigError(
            "give the jobs of the array evenly spaced numbers, as --array=0-7: each takes its share by them"
        )
    return shards[jobs.index(number) :: len(jobs)]


def _current(shard: Shard, index_dir: str, *, full: bool) -> Sidecar | EarwitnessError:
    """The index of a shard as it is now, or why there is none."""
    try:
        sidecar = load_sidecar(shard, index_dir)
        if sidecar is None and find(sidecar_location(shard, index_dir)):
            print(f"{shard.location.url}: changed since it was indexed; it is indexed anew", flush=True)
        return sidecar if sidecar and (sidecar.full or not full) else index_shard(shard, index_dir, full=full)
    except EarwitnessError as error:
        return error


def _report(shard: Shard, sidecar: Sidecar) -> Counter[str]:
    rows = sidecar.table.select(["key", "seconds", "problem"]).to_pylist()
    problems: dict[str, list[str]] = {}
    for row in filter(lambda row: row["problem"], rows):
        problems.setdefault(row["problem"], []).append(row["key"])
    for problem, keys in problems.items():
        print(
            f"{shard.location.url}: {keys[0]}: {problem}"
            + f"; and {len(keys) - 1:,} others" * (len(keys) > 1)
        )
    if sidecar.damage:
        print(f"{shard.location.url}: {sidecar.loss()}")
    sound = [row for row in rows if not row["problem"]]
    seconds = sum(row["seconds"] for row in sound) if sidecar.full else 0
    return Counter(
        samples=len(sound), seconds=seconds, problems=len(rows) - len(sound), damaged=bool(sidecar.damage)
    )


if __name__ == "__main__":
    run_command(lambda: typer.run(index))
