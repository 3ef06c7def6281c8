"""Metrics of captions: what a model says of clips, held against what people say of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from configs.errors import EarwitnessError
from configs.run.predictions import Prediction
from trainer import parts
from trainer.said import Said


@dataclass(frozen=True)
class Scored:
    """What came of scoring.

    means: over all clips (`cider_d`) and over those of a source (`cider_d/SOURCE`); predictions: as they
    were, with the scores of each clip within its source; failed: metrics that broke, and why.
    """

    means: dict[str, float]
    predictions: list[Prediction]
    failed: dict[str, str]


def score(
    predictions: Sequence[Prediction],
    names: Sequence[str] = parts.NAMES,
    folders: Mapping[str, str] | None = None,
    sign_of_life: Callable[[], None] = lambda: None,
) -> Scored:
    """Score captions by some metrics; those that cannot be had here are left out. folders: by metric, as in
    `evaluate.parts`; sign_of_life: called before each metric and source."""
    scored = Scored({}, [replace(clip, scores=dict(clip.scores)) for clip in predictions], {})
    said = [Said.of(prediction) for prediction in predictions]
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for row, prediction in enumerate(predictions):
        rows[prediction.source].append(row)
    for name in names if said else ():
        opened = parts.opened(name, folders or {})
        if opened is None:
            continue
        try:
            with opened as metric:
                of_sources = {}
                for source in rows:
                    sign_of_life()
                    of_sources[source] = metric([said[row] for row in rows[source]])
                sign_of_life()
                of_all = metric(said) if len(rows) > 1 else next(iter(of_sources.values()))
        except Exception as error:  # of a library, a program or a model: it ends no training
            is_explained = isinstance(error, EarwitnessError)
            scored.failed[name] = str(error) if is_explained else f"{type(error).__name__}: {error}"
            continue
        means = {name: of_all} | {f"{name}/{source}": figures for source, figures in of_sources.items()}
        scored.means.update((key, figures.mean) for key, figures in means.items() if figures)
        for source, figures in of_sources.items():
            for row, value in zip(rows[source], figures.each if figures else (), strict=False):
                scored.predictions[row].scores[name] = value
    return scored
