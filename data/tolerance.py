"""How many samples may be bad."""

from __future__ import annotations

LEAST_COUNTED = 1000
"""Samples from which on `data.max_bad_fraction` counts; of fewer, one would be too many."""
FEW = 8
"""So many samples are not all unusable by chance."""


def too_many_bad(bad: float, seen: float, allowed: float, few: int = FEW) -> bool:
    """Whether more of the samples that were seen are bad than the share `allowed`: counted from LEAST_COUNTED
    samples on; of fewer, half of them are too many, if that is `few` or more."""
    if bad > allowed * max(LEAST_COUNTED, seen):
        return True
    return bad > allowed * seen and bad >= max(few, seen / 2)
