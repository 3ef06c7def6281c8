"""Which metrics of captions can be had on this machine, and what the others lack. Nothing is ever fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from configs.errors import ConfigError
from configs.metrics import name_of
from trainer import aac, counts, meteor, sentences
from trainer.said import Metric


@dataclass(frozen=True)
class Part:
    """A metric that works from a folder. check: raises ConfigError if the folder will not do."""

    check: Callable[[Path], None]
    opened: Callable[[Path], AbstractContextManager[Metric]]


PARTS = {
    "meteor": Part(meteor.check, meteor.opened),
    "sbert_sim": Part(sentences.check, sentences.opened),
}
NAMES = (*aac.METRICS, *counts.METRICS, *PARTS)
"""Metrics of captions, in the order in which they are told."""


def check(folders: Mapping[str, str], best_metric: str) -> None:
    """Raise ConfigError if a folder of `evaluate.parts` will not do, or if `evaluate.best_metric` cannot be
    had."""
    for name, folder in folders.items():
        if name not in PARTS:
            raise ConfigError(f"evaluate.parts.{name}: no metric that wants a folder; {', '.join(PARTS)} do")
        PARTS[name].check(Path(folder).expanduser())
    lacking = _lacking(name_of(best_metric), folders)
    if lacking:
        raise ConfigError(f"evaluate.best_metric: {best_metric} cannot be had: {lacking}")


def remark() -> str:
    """What is told at the start if metrics are missing that need no more than a library; empty if none is."""
    return f"no {', '.join(aac.METRICS)}: {aac.problem()}" if aac.problem() else ""


def opened(name: str, folders: Mapping[str, str]) -> AbstractContextManager[Metric] | None:
    """A metric, for as long as its program or model is needed; None if it cannot be had here."""
    if _lacking(name, folders):
        return None
    if name in PARTS:
        return PARTS[name].opened(Path(folders[name]).expanduser())
    return nullcontext((aac.METRICS | counts.METRICS)[name])


def _lacking(name: str, folders: Mapping[str, str]) -> str:
    """Why a metric cannot be had; empty if it can."""
    if name in aac.METRICS:
        return aac.problem()
    if name in PARTS and name not in folders:
        return f"it needs a folder, evaluate.parts.{name} (docs/evaluation.md)"
    return ""
