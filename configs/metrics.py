"""The metrics of an evaluation, by name: which there are, and which way is better."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

HIGHER_IS_BETTER = {
    "loss": False,
    "loss_own": False,
    "cider_d": True,
    "bleu_1": True,
    "bleu_4": True,
    "rouge_l": True,
    "exact_match": True,
    "length_ratio": None,
    "distinct_1": True,
    "distinct_2": True,
    "repetition_rate": False,
    "empty_rate": False,
    "discrimination": True,
    "silence_words": False,
    "silence_repetition_rate": False,
    "noise_words": False,
    "noise_repetition_rate": False,
    "meteor": True,
    "sbert_sim": True,
}
"""By name; None where there is a right value (1), and neither more nor less is better."""
CURVES = "validation/"
"""What the name of a metric begins with in curves and settings: `validation/cider_d`, or
`validation/cider_d/SOURCE` for the clips of one source."""


def name_of(curve: str) -> str:
    """The name of a metric, of the name of its curve: `cider_d` of `validation/cider_d/SOURCE`."""
    return curve.removeprefix(CURVES).partition("/")[0]


def is_of_captions(curve: str) -> bool:
    """Whether it takes captions to know a curve."""
    return name_of(curve) not in ("loss", "loss_own")


def cost(curve: str, metrics: Mapping[str, float]) -> float:
    """The value of a curve, its negative where higher is better: the best has the lowest cost. Infinity if
    there is no such value."""
    value = metrics.get(curve, math.nan)
    if not math.isfinite(value):
        return math.inf
    return -value if HIGHER_IS_BETTER.get(name_of(curve)) else value


def is_higher_better(curve: str, sources: Sequence[str]) -> bool:
    """Whether the best checkpoint has the highest value of a curve, or the lowest.

    Raises ValueError, in words and with the nearest name, if there is no such curve or it marks no best.
    """
    better = {
        CURVES + name + of: is_higher
        for name, is_higher in HIGHER_IS_BETTER.items()
        for of in ("", *(f"/{source}" for source in sources))
    }
    if curve not in better:
        raise ValueError(_unknown(curve, list(better), sources))
    is_higher = better[curve]
    if is_higher is None:
        raise ValueError(
            f"{name_of(curve)} is best at 1, neither high nor low, and marks no best checkpoint; take"
            f" another, as {CURVES}cider_d"
        )
    return is_higher


def _unknown(curve: str, known: list[str], sources: Sequence[str]) -> str:
    near = difflib.get_close_matches(CURVES + curve.removeprefix(CURVES), known, 1, 0.5)
    names = [name for name, is_higher in HIGHER_IS_BETTER.items() if is_higher is not None]
    return (
        f"there is no metric {curve!r}{f'; did you mean {near[0]!r}?' if near else '.'} One is"
        f" {CURVES}NAME, or {CURVES}NAME/SOURCE for one source ({', '.join(sources)}); NAME is one of"
        f" {', '.join(names)}"
    )
