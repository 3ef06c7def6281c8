"""What benchmarks share: how they start processes, and how they say what they have found."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
Figures = dict[str, float]


def environment() -> dict[str, str]:
    """Of a process that is measured."""
    # Large pages: page faults cost a step of `small` 2.5-4 s of system time per rank without them here,
    # 0.9-2.7 s with them.
    return os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "THP_MEM_ALLOC_ENABLE": "1"}


def say(text: str) -> None:
    """Tell what is going on, on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def summary(rows: Sequence[Figures]) -> dict[str, Any]:
    """Rounds of one measurement, and their median."""
    return {
        "median": {name: statistics.median(row[name] for row in rows) for name in rows[0]},
        "rounds": rows,
    }


def describe(*packages: str) -> dict[str, Any]:
    """The day, this machine, and the versions of packages."""
    machine = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    return machine | {name: version(name) for name in packages}


def report(
    about: dict[str, Any],
    tables: dict[str, dict[str, Any]],
    aims: dict[str, dict[str, Any]],
    unit: str,
    as_json: bool,
) -> None:
    """Print what was found: tables of summaries by name, and how it compares to what Earwitness aims at, in a
    unit."""
    if as_json:
        print(json.dumps(about | tables | {"aims": aims}))
        return
    print(
        ", ".join(
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
            for name, value in about.items()
        )
    )
    for title, methods in tables.items():
        columns = list(dict.fromkeys(name for found in methods.values() for name in found["median"]))
        table = Table(
            *(name.replace("_", "\n") for name in (title, *columns)),
            title=f"{title}: median (lowest - highest)",
            title_justify="left",
        )
        for method, found in methods.items():
            values = {name: [row[name] for row in found["rounds"]] for name in found["median"]}
            cells = {
                name: f"{found['median'][name]:.3f} ({min(each):.3f} - {max(each):.3f})"
                for name, each in values.items()
            }
            table.add_row(method, *(cells.get(name, "") for name in columns))
            if first := found.get("first"):
                table.add_row("  first", *(f"{first[name]:.3f}" if name in first else "" for name in columns))
        Console(width=160).print(table)
    for name, aim in aims.items():
        print(
            f"{name}: {aim['value']:.3f}{unit}; aim: at most {aim['at_most']:g},"
            f" {'met' if aim['met'] else 'NOT met'}"
        )
