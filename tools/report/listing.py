"""The clips of a page: which, in what order, and what a model has said of them over time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from configs.metrics import HIGHER_IS_BETTER
from configs.run.predictions import Prediction, read_predictions
from tools.report.sound import Media
from tools.report.texts import Piece, pieces


@dataclass(frozen=True)
class Score:
    """A score of a clip. place: 0 for the worst of the page, more for better ones; badness: the same as a
    share, 1 for the worst."""

    name: str
    value: float
    place: int
    badness: float


@dataclass
class Said:
    """A caption, and the evaluations in a row that have it."""

    caption: str
    first: int
    last: int
    loss: float
    pieces: list[Piece]


@dataclass(frozen=True)
class Clip:
    """A clip on the page. anchor: its name in links, of its own even where keys are not."""

    anchor: str
    prediction: Prediction
    media: Media
    scores: list[Score]
    pieces: list[Piece]
    """The caption."""
    said: list[Said] = field(default_factory=list)
    """Over time, oldest first."""

    @property
    def places(self) -> dict[str, int]:
        """By score, for the page to sort."""
        return {score.name: score.place for score in self.scores}


def worst_first(predictions: Sequence[Prediction], metric: str) -> list[Prediction]:
    """The clips of each source in turn, the worst first."""
    by_source: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in sorted(predictions, key=lambda each: _order(each, metric)):
        by_source[prediction.source].append(prediction)
    most = max(map(len, by_source.values()), default=0)
    return [of[turn] for turn in range(most) for of in by_source.values() if turn < len(of)]


def listed(predictions: Sequence[Prediction], media: Sequence[Media], metric: str) -> list[Clip]:
    """Clips in the order in which a page shows them first, the worst of all sources first."""
    parts = zip(predictions, media, _scores(predictions), strict=True)
    numbers: dict[str, int] = defaultdict(int)
    clips = []
    for prediction, its_media, scores in sorted(parts, key=lambda part: _order(part[0], metric)):
        key = prediction.key
        numbers[key] += 1
        anchor = f"{key}~{numbers[key]}" if numbers[key] > 1 else key
        clips.append(Clip(anchor, prediction, its_media, scores, pieces(prediction.caption)))
    return clips


def add_history(clips: Sequence[Clip], files: Mapping[int, Path], now: int) -> None:
    """Add what earlier evaluations have of these clips. files: by step; now: the step of the page."""
    said = {clip.prediction.key: clip.said for clip in clips}
    for step in sorted(step for step in files if step < now):
        for prediction in read_predictions(files[step]):
            if prediction.key in said:
                _add(said[prediction.key], step, prediction)
    for clip in clips:
        if clip.said:
            _add(clip.said, now, clip.prediction)


def _add(said: list[Said], step: int, prediction: Prediction) -> None:
    caption, before = prediction.caption, said[-1].caption if said else None
    if caption == before:
        said[-1] = replace(said[-1], last=step, loss=prediction.loss)
    else:
        said.append(Said(caption, step, step, prediction.loss, pieces(caption, before)))


def values(prediction: Prediction) -> dict[str, float]:
    """All scores of a clip, its loss first."""
    return {"loss": prediction.loss, **prediction.scores}


def names_of_scores(predictions: Iterable[Prediction]) -> list[str]:
    """All that clips have, in the order in which they come."""
    return list(dict.fromkeys(name for prediction in predictions for name in values(prediction)))


def _order(prediction: Prediction, metric: str) -> tuple[float, float]:
    """Less is worse; among those that are alike the loss decides."""
    return _goodness(metric, values(prediction).get(metric)), _goodness("loss", prediction.loss)


def _goodness(name: str, value: float | None) -> float:
    """More is better, whatever the score. What is not there comes last, what is no number first."""
    if value is None:
        return math.inf
    if math.isnan(value):
        return -math.inf
    better = HIGHER_IS_BETTER.get(name, True)
    return -abs(value - 1) if better is None else value if better else -value


def _scores(predictions: Sequence[Prediction]) -> list[list[Score]]:
    """The scores of each clip, with their places among all."""
    scores: list[list[Score]] = [[] for _ in predictions]
    for name in names_of_scores(predictions):
        known = [values(prediction).get(name) for prediction in predictions]
        goodness = sorted({_goodness(name, value) for value in known if value is not None})
        places = {good: place for place, good in enumerate(goodness)}
        for value, of_clip in zip(known, scores, strict=True):
            if value is not None:
                place = places[_goodness(name, value)]
                badness = 1 - place / (len(places) - 1) if len(places) > 1 else 0.0
                of_clip.append(Score(name, value, place, badness))
    return scores
