"""What a page says of a run before its clips: what it is, its metrics, curves and attempts. Without names of
machines, folders and buckets: pages are sent around."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs.run.causes import Cause
from configs.run.events import Evaluated, TrainingBegan
from configs.run.folder import RunDir
from configs.run.goodput import AttemptSummary, summarize
from configs.run.lease import holder
from configs.run.ledger import History
from configs.run.predictions import Prediction
from configs.schema import RunConfig
from slurm.chain import seen_end
from tools.report.curves import Chart, charts
from trainer.hub import is_hub_name

ALL = ""
"""Stands for all sources together."""

Metrics = dict[str, dict[str, float]]
"""Values by metric and source."""


@dataclass(frozen=True)
class Attempt:
    """A start of the run, in words."""

    number: int
    ranks: str
    """Nodes and processes on each, as `2 x 8`."""
    began: str
    ended: str
    cause: str
    steps: str
    speed: str


@dataclass
class Overview:
    """The top of a page."""

    name: str
    model: str = ""
    """What the run began with."""
    progress: str = ""
    metrics: Metrics = field(default_factory=dict)
    """Of the last evaluation."""
    of: str = ""
    """What these are metrics of."""
    charts: list[Chart] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    """In the order of the config."""
    best_metric: str = "loss"


def of_run(run: RunDir, config: RunConfig) -> Overview:
    """What the ledger of a run tells."""
    history = run.ledger.read()
    _settle(run, history)
    rows = summarize(history, time.time())
    started = history.last(TrainingBegan)
    step = next((row.last for row in reversed(rows) if row.last is not None), 0)
    sources = [source.name for source in config.data.sources]
    evaluated = {
        event.step: by_metric(event.metrics, sources) for event in history.of(Evaluated) if event.metrics
    }
    base = config.model.name_or_path
    best = next(iter(by_metric({config.evaluate.best_metric: 0.0}, sources)))
    last = max(evaluated, default=0)
    return Overview(
        name=config.run.name,
        model=base if is_hub_name(base) else Path(base).name,
        progress=f"step {step:,} of {started.total_steps:,}" if started else "not begun",
        metrics=evaluated.get(last, {}),
        of=f"evaluation at step {last:,}",
        charts=charts(evaluated, [ALL, *sources], best),
        attempts=[_attempt(row) for row in rows],
        sources=sources,
        best_metric=best,
    )


def of_file(path: Path, predictions: Sequence[Prediction]) -> Overview:
    """What predictions tell: means over their clips."""
    values: dict[tuple[str, str], list[float]] = {}
    for prediction in predictions:
        for metric, value in {"loss": prediction.loss, **prediction.scores}.items():
            for source in (ALL, prediction.source):
                values.setdefault((metric, source), []).append(value)
    metrics: Metrics = {}
    for (metric, source), of_clips in values.items():
        metrics.setdefault(metric, {})[source] = sum(of_clips) / len(of_clips)
    return Overview(name=path.stem, metrics=metrics, of=f"means over {len(predictions):,} clips")


def by_metric(metrics: Mapping[str, float], sources: Sequence[str]) -> Metrics:
    """Metrics as the ledger has them (validation/METRIC, validation/METRIC/SOURCE), by metric and source."""
    sorted_out: Metrics = {}
    for key, value in metrics.items():
        name = key.removeprefix("validation/")
        metric, _, source = name.rpartition("/")
        if source not in sources or not metric:
            metric, source = name, ALL
        sorted_out.setdefault(metric, {})[source] = value
    return sorted_out


def _settle(run: RunDir, history: History) -> None:
    """Find out how attempts ended of whose end nobody has told."""
    now = holder(run)
    for began in history.unsettled:
        if not (now and now.alive and now.attempt == began.attempt):
            history.events.append(seen_end(run, history, began.attempt))


def _attempt(row: AttemptSummary) -> Attempt:
    steps = "" if row.first is None else f"{row.first:,}-{row.last:,}"
    return Attempt(
        number=row.attempt,
        ranks=f"{len(row.nodes)} x {row.ranks // len(row.nodes)}",
        began=_clock(row.begin),
        ended=_clock(row.end) if row.end else "",
        cause=Cause(row.cause).words if row.cause else "at work",
        steps=steps + (f" ({row.repeated:,} lost)" if row.repeated else ""),
        speed="" if row.samples_per_second is None else f"{row.samples_per_second:.1f}",
    )


def _clock(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(when))
