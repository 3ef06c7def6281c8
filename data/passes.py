"""How often each source comes in an epoch: by its weight, and evened out by temperature."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Context, Decimal

from configs.schema import Data

DIGITS = Context(prec=28)


def passes(data: Data, sizes: Sequence[int]) -> list[float]:
    """Passes over each source in an epoch. sizes: samples that each has to train on.

    The epoch has as many samples as with the weights alone. Decimals are the same on every machine, where
    powers of floats may differ in the last digit: all ranks must come to the same order.
    """
    weights = [source.weight for source in data.sources]
    if data.temperature == 1 or not all(sizes):  # a run has samples of each; here somebody only asks
        return weights
    samples = [Decimal(size) * Decimal(weight) for size, weight in zip(sizes, weights, strict=True)]
    exponent = 1 / Decimal(data.temperature)
    evened = [DIGITS.power(count / max(samples), exponent) for count in samples]
    scale = sum(samples, Decimal()) / sum(evened, Decimal())
    return [float(count * scale / size) for count, size in zip(evened, sizes, strict=True)]


def passes_in_words(data: Data, sizes: Sequence[int]) -> str:
    """What temperature makes of the weights; empty where it changes nothing. sizes: samples that each source
    has to train on."""
    if data.temperature == 1:
        return ""
    for source, size in zip(data.sources, sizes, strict=True):
        if not size:
            return f"passes per epoch are not known: source {source.name} has no sample to train on"
    by_source = [
        f"{source.name} {of_epoch:.3g} (weight {source.weight:g})"
        for source, of_epoch in zip(data.sources, passes(data, sizes), strict=True)
    ]
    return f"passes per epoch with data.temperature={data.temperature:g}: {', '.join(by_source)}"
