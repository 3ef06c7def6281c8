"""`python -m tools.index SHARDS...` or `python -m tools.index CONFIG`: find every sample of every shard, once, off the GPUs."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import run_command
from configs.schema import Data
from data.index import Sidecar, index_shard, load_sidecar
from data.sources import Shard, expand
from tools.arguments import named_sources


def index(
    shards: Annotated[list[str], typer.Argument(help="Shards (paths, URLs, globs, braces), or one config: all its sources.", metavar="SHARDS...|CONFIG")],
    quick: Annotated[bool, typer.Option("--quick", help="Headers only: no CRC32, no seconds, no look at the content.")] = False,
    caption_key: Annotated[str, typer.Option(help="Where the caption is (for SHARDS).")] = "caption",
    index_dir: Annotated[Path, typer.Option(help="Where the indexes go (for SHARDS).")] = Data.model_fields["index_dir"].default,
    threads: Annotated[int, typer.Option(min=1, help="Shards at a time.")] = 8,
) -> None:
    """Index shards, and name every problem. What is there already and current is not done again."""
    sources, config = named_sources(shards, caption_key)
    index_dir = config.data.index_dir if config else index_dir
    todo = [shard for source in sources for shard in expand(source)]
    totals: Counter[str] = Counter()
    with ThreadPoolExecutor(threads) as pool:
        for shard, sidecar in zip(todo, pool.map(lambda shard: _current(shard, index_dir, full=not quick), todo), strict=True):
            totals += _report(shard, sidecar)
    hours = "" if quick else f", {totals['seconds'] / 3600:.2f} h"
    print(f"{index_dir}: {len(todo)} shards, {totals['samples']} samples{hours}, {totals['problems']} with a problem, {totals['damaged']} shards damaged")


def _current(shard: Shard, index_dir: Path, *, full: bool) -> Sidecar:
    sidecar = load_sidecar(shard, index_dir)
    return sidecar if sidecar and (sidecar.full or not full) else index_shard(shard, index_dir, full=full)


def _report(shard: Shard, sidecar: Sidecar) -> Counter[str]:
    rows = sidecar.table.select(["key", "seconds", "problem"]).to_pylist()
    for row in rows:
        if row["problem"]:
            print(f"{shard.location.url}: {row['key']}: {row['problem']}")
    if sidecar.damage:
        print(f"{shard.location.url}: {sidecar.loss()}")
    sound = [row for row in rows if not row["problem"]]
    seconds = sum(row["seconds"] for row in sound) if sidecar.full else 0
    return Counter(samples=len(sound), seconds=seconds, problems=len(rows) - len(sound), damaged=bool(sidecar.damage))


if __name__ == "__main__":
    run_command(lambda: typer.run(index))
