"""What benchmarks share: the environment of the processes that are measured, and how results are printed."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
Figures = dict[str, float]
"""What one measurement has given, by name; the unit is in the name."""


class Summary(TypedDict):
    """The rounds of one measurement, and the median of each figure."""

    median: Figures
    rounds: Sequence[Figures]
    first: NotRequired[Figures]
    """A first round that does not count."""


@dataclass(frozen=True)
class Aim:
    """A figure, and the most that it should be."""

    value: float
    at_most: float

    @property
    def met(self) -> bool:
        """Whether the figure is as small as it should be."""
        return self.value <= self.at_most


def environment() -> dict[str, str]:
    """The environment of a process that is measured."""
    # Large pages: page faults cost a step of `small` 2.5-4 s of system time per rank without them here,
    # 0.9-2.7 s with them.
    return os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "THP_MEM_ALLOC_ENABLE": "1"}


def say(text: str) -> None:
    """Tell what is going on, on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def summary(rounds: Sequence[Figures]) -> Summary:
    """The medians of some rounds, which all have the same figures."""
    medians = {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
    return {"median": medians, "rounds": rounds}


def aims(values: Figures, limits: Mapping[str, float]) -> dict[str, Aim]:
    """Each value with the limit of the same name."""
    return {name: Aim(value, limits[name]) for name, value in values.items()}


def describe(*packages: str) -> dict[str, Any]:
    """The day, this machine, and the versions of packages."""
    machine = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    return machine | {name: version(name) for name in packages}


def report(
    conditions: dict[str, Any],
    tables: dict[str, dict[str, Summary]],
    aims: dict[str, Aim],
    *,
    unit: str = "",
    as_json: bool,
) -> None:
    """Print under which conditions what was measured, tables of summaries by name, and which aims are met.

    unit: of the aims.
    """
    if as_json:
        verdicts = {
            name: {"value": aim.value, "at_most": aim.at_most, "met": aim.met} for name, aim in aims.items()
        }
        print(json.dumps({**conditions, **tables, "aims": verdicts}))
        return
    print(", ".join(f"{name} {_grouped(value)}" for name, value in conditions.items()))
    for title, summaries in tables.items():
        Console(width=160).print(_table(title, summaries))
    for name, aim in aims.items():
        verdict = "met" if aim.met else "NOT met"
        print(f"{name}: {aim.value:.3f}{unit}; aim: at most {aim.at_most:g}, {verdict}")


def _grouped(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(title: str, summaries: dict[str, Summary]) -> Table:
    columns = list(dict.fromkeys(name for summary in summaries.values() for name in summary["median"]))
    table = Table(
        *(name.replace("_", "\n") for name in (title, *columns)),
        title=f"{title}: median (lowest - highest)",
        title_justify="left",
    )
    for method, summary in summaries.items():
        table.add_row(method, *(_cell(summary, name) for name in columns))
        first = summary.get("first")
        if first is not None:
            table.add_row("  first", *(f"{first[name]:.3f}" if name in first else "" for name in columns))
    return table


def _cell(summary: Summary, name: str) -> str:
    if name not in summary["median"]:
        return ""
    values = [figures[name] for figures in summary["rounds"]]
    if min(values) == max(values):
        return f"{values[0]:.3f}"
    return f"{summary['median'][name]:.3f} ({min(values):.3f} - {max(values):.3f})"
