"""What benchmarks share: the environment of the processes that are measured, and how results are printed."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from rich.console import Console
from rich.table import Table

from configs.errors import EarwitnessError

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

    def __str__(self) -> str:
        return f"{self.value:.3f}; aim: at most {self.at_most:.3g}, {'met' if self.met else 'NOT met'}"


def environment(*, gpus: bool = False) -> dict[str, str]:
    """The environment of a process that is measured. gpus: whether it sees those of this machine."""
    # Large pages: page faults cost a step of `small` 2.5-4 s of system time per rank without them here,
    # 0.9-2.7 s with them.
    own_code_first = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = os.environ | {"PYTHONPATH": own_code_first, "THP_MEM_ALLOC_ENABLE": "1"}
    return variables if gpus else variables | {"CUDA_VISIBLE_DEVICES": ""}


def run_module(*arguments: object, gpus: bool = False) -> str:
    """Run `python -m ...` of Earwitness in a fresh process; returns what it prints. Raises EarwitnessError if
    it fails."""
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(gpus=gpus), capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        raise EarwitnessError(f"{arguments[0]} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


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
        print(json.dumps({**conditions, **tables, "aims": verdicts(aims)}))
        return
    print(", ".join(f"{name} {grouped(value)}" for name, value in conditions.items()))
    for title, summaries in tables.items():
        Console(width=160).print(_table(title, summaries))
    for name, aim in aims.items():
        print(f"{name}{unit}: {aim}")


def verdicts(aims: Mapping[str, Aim]) -> dict[str, dict[str, float | bool]]:
    """Aims, as JSON has them."""
    return {name: {"value": aim.value, "at_most": aim.at_most, "met": aim.met} for name, aim in aims.items()}


def grouped(value: Any) -> str:
    """A value as a line of text has it."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(title: str, summaries: dict[str, Summary]) -> Table:
    if len(summaries) == 1:
        return _list(title, *next(iter(summaries.items())))
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


def _list(title: str, method: str, figures: Summary) -> Table:
    """A table of one measurement, with a line for each figure."""
    table = Table("", method, title=f"{title}: median (lowest - highest)", title_justify="left")
    for name in figures["median"]:
        table.add_row(name.replace("_", " "), _cell(figures, name))
    return table


def _cell(summary: Summary, name: str) -> str:
    if name not in summary["median"]:
        return ""
    values = [figures[name] for figures in summary["rounds"]]
    if min(values) == max(values):
        return f"{values[0]:.3f}"
    return f"{summary['median'][name]:.3f} ({min(values):.3f} - {max(values):.3f})"
