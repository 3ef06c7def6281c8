"""Metrics that count: they give away a captioner that loops, says the same of all clips, or says nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from trainer.said import Figures, Metric, Said

LOOP_WORDS = 4
"""Words in a row that, said again, count as repeated: a sane caption rarely does that."""
PIECE = re.compile(r"\w{1,16}")
"""A word; of a longer one a piece, so that a loop without blanks is seen, too."""


def exact_match(clips: Sequence[Said]) -> Figures:
    """Share of captions that are a reference, word for word."""
    return Figures.averaged([float(clip.caption in clip.references) for clip in clips])


def length_ratio(clips: Sequence[Said]) -> Figures:
    """Words of the captions to words of the references, of several the mean."""
    said = [len(clip.caption.split()) for clip in clips]
    wanted = [
        sum(len(reference.split()) for reference in clip.references) / len(clip.references) for clip in clips
    ]
    return Figures(sum(said) / sum(wanted), [a / b for a, b in zip(said, wanted, strict=True)])


def distinct(n: int) -> Metric:
    """Distinct n-grams to n-grams, over all captions; 0 without any."""

    def metric(clips: Sequence[Said]) -> Figures:
        ngrams = [ngram for clip in clips for ngram in _ngrams(clip.caption.split(), n)]
        return Figures(len(set(ngrams)) / max(1, len(ngrams)))

    return metric


def repetition_rate(clips: Sequence[Said]) -> Figures:
    """Share of the n-grams of a caption that have come before in it."""
    return Figures.averaged([repeated(clip.caption) for clip in clips])


def repeated(caption: str) -> float:
    """The share of its n-grams that have come before in it."""
    ngrams = list(_ngrams(PIECE.findall(caption), LOOP_WORDS))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _ngrams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[first:] for first in range(n)), strict=False)


def empty_rate(clips: Sequence[Said]) -> Figures:
    """Share of captions without a word."""
    return Figures.averaged([float(not clip.caption) for clip in clips])


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "length_ratio": length_ratio,
    "distinct_1": distinct(1),
    "distinct_2": distinct(2),
    "repetition_rate": repetition_rate,
    "empty_rate": empty_rate,
}
