"""`python -m tools.bench trace FILE`: what a trace of torch's profiler says of a GPU."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from configs.errors import DataError
from tools.bench.report import Figures

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
SHORT_GAP = 50.0
"""Microseconds below which a gap is the launching of a kernel rather than a wait."""
NOISE = re.compile(r"^void |at::native::|\(anonymous namespace\)::")
SHOWN, NAME_LENGTH = 15, 110


def bench_trace(
    file: Annotated[Path, typer.Argument(help="Chrome trace, .json or .json.gz.", metavar="FILE")],
) -> None:
    """Show what a trace says of a GPU: its idle share, and where the time goes."""
    events = read(file)
    for name, value in idle(events).items():
        print(f"{name.replace('_', ' ')}: {value:.3f}")
    spent = milliseconds_by_name(events, ON_DEVICE)
    total = sum(spent.values())
    table = Table("ms", "share", "times", "kernel or copy", title="by time", title_justify="left")
    for name, value in spent.most_common(SHOWN):
        times = sum(1 for event in events if event["name"] == name)
        table.add_row(f"{value:.2f}", f"{value / total:.1%}", str(times), NOISE.sub("", name)[:NAME_LENGTH])
    Console(width=160).print(table)
    waits = milliseconds_by_name(events, ("cuda_runtime",))
    for name, value in waits.most_common():
        if "Synchronize" in name or name == "cudaMemcpyAsync":
            print(f"the host is in {name}: {value:.1f} ms")


def read(file: Path) -> list[dict[str, Any]]:
    """The events of a trace that have a length. Raises DataError if nothing in it ran on a GPU."""
    content = file.read_bytes()
    if file.suffix == ".gz":
        content = gzip.decompress(content)
    events = [event for event in json.loads(content)["traceEvents"] if event.get("ph") == "X"]
    if not any(event.get("cat") in ON_DEVICE for event in events):
        raise DataError(f"{file}: has no kernels, only {len(events)} events of the CPU")
    return events


def idle(events: list[dict[str, Any]]) -> Figures:
    """Share of the time from the first kernel to the last in which none ran, nor a copy: all of it, and that
    in gaps so long that the host must have waited; the longest gaps."""
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in ON_DEVICE
    )
    begin = reached = spans[0][0]
    gaps = []
    for start, end in spans:
        if start > reached:
            gaps.append(start - reached)
        reached = max(reached, end)
    length = reached - begin
    return {
        "milliseconds": length / 1e3,
        "idle_share": sum(gaps) / length,
        "idle_share_in_long_gaps": sum(gap for gap in gaps if gap >= SHORT_GAP) / length,
        "longest_gap_milliseconds": max(gaps, default=0.0) / 1e3,
    }


def milliseconds_by_name(events: list[dict[str, Any]], categories: tuple[str, ...]) -> Counter[str]:
    """Milliseconds of the events of some categories, by their names."""
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in categories:
            spent[event["name"]] += event["dur"] / 1e3
    return spent
