"""What `launch status` says of a run's samples: what there is to train on, and what could not be used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from configs.run.events import LeftOut, Samples
from configs.run.ledger import History
from configs.run.quarantine import Quarantined
from configs.schema import RunConfig
from data.passes import passes_in_words

SHOWN = 3
"""Reasons, and lines, that are printed; `--json` has all."""


@dataclass
class SourceReport:
    """The samples of a source, by what the last start knew of them, and what has been met since."""

    source: str
    samples: int | None = None
    """All that its shards hold: those for training and for validation, and those left out. None, as the next
    four: no start has told, as those of earlier versions did not."""
    training: int | None = None
    validation: int | None = None
    unusable: int | None = None
    """Left out, as the index knows that something is wrong with them."""
    too_long: int | None = None
    """Left out, as the index knows their length."""
    passes: float | None = None
    """Over those for training, per epoch."""
    met_unusable: int = 0
    """Of those for training and validation, what attempts could not use when it came up."""
    met_reasons: dict[str, int] = field(default_factory=dict)
    """How many of them by reason (numbers in it aside), the commonest first."""


@dataclass
class SamplesReport:
    """All samples of a run."""

    sources: list[SourceReport]
    """Empty until a start has read the index, or something could not be used."""
    left_out: list[str]
    """What the last start told of samples that it leaves out or cuts."""

    @classmethod
    def of(cls, history: History, quarantined: Quarantined) -> SamplesReport:
        """What the ledger and the quarantine of a run tell."""
        met: dict[str, dict[str, int]] = {}
        for (source, reason), keys in quarantined.by_reason().items():
            met.setdefault(source, {})[reason] = len(keys)
        known, left_out = history.last(Samples), history.last(LeftOut)
        told = known or left_out
        counts: list[dict[str, Any]] = [{"source": source} for source in met]
        if known:
            counts = [asdict(source) for source in known.sources]
        sources = []
        for count in counts:
            reasons = met.get(count["source"], {})
            sources.append(SourceReport(**count, met_unusable=sum(reasons.values()), met_reasons=reasons))
        return cls(sources, [event.what for event in history.of(LeftOut, told.attempt)] if told else [])

    def table(self) -> Table:
        """A row for each source."""
        columns = ("samples", "training", "passes", "validation", "unusable", "too long", "met unusable")
        table = Table("source", *columns, "", box=None)
        for source in self.sources:
            reasons = [f"{count:,} x {reason}" for reason, count in source.met_reasons.items()]
            counts = (
                source.samples,
                source.training,
                source.passes,
                source.validation,
                source.unusable,
                source.too_long,
                source.met_unusable,
            )
            in_words = [_in_words(count) for count in counts]
            table.add_row(source.source, *in_words, "; ".join(_some(reasons)))
        return table

    def lines(self) -> Iterator[str]:
        """Some of what the last start told."""
        yield from (f"left out: {line}" for line in _some(self.left_out))


def passes_of(config: RunConfig) -> str:
    """What temperature makes of the weights, as far as it is known: the run has an index from its first start
    on."""
    from data import dataset  # takes a second

    try:
        sizes = dataset.open_dataset(config, config.run.dir).training.samples_by_source()
    except (OSError, KeyError):  # there is none, or one of other sources
        return (
            "passes per epoch with data.temperature depend on the numbers of samples: the first start prints"
            " them, and `python -m tools.inspect CONFIG` what they will be, about"
        )
    return passes_in_words(config.data, sizes)


def _in_words(count: float | None) -> str:
    if count is None:
        return "?"
    return f"{count:,}" if isinstance(count, int) else f"{count:.3g}"


def _some(lines: list[str]) -> list[str]:
    """The first ones, and how many more there are."""
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], f"{more} more (--json)"] if more > 0 else lines
