"""The samples of a run that could not be used, each with its reason."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from configs.run.files import JsonLines


def without_numbers(reason: str) -> str:
    """A reason with N for each number: what differs from sample to sample."""
    return re.sub(r"\d[\d.,]*", "N", reason)


@dataclass(frozen=True)
class Unusable:
    """A sample that could not be used. key: SOURCE/SHARD_FILE/KEY; step: None for a validation sample."""

    attempt: int
    rank: int
    key: str
    reason: str
    step: int | None


@dataclass
class Quarantined:
    """What the quarantine holds: a sample comes as often as attempts could not use it."""

    samples: list[Unusable] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    """Places (FILE:LINE) of torn lines."""

    def by_reason(self) -> dict[tuple[str, str], list[str]]:
        """Keys by source and reason (numbers in it aside); the commonest first."""
        reasons = {sample.key: sample.reason for sample in self.samples}
        grouped: dict[tuple[str, str], list[str]] = {}
        for key, reason in reasons.items():
            source = key.partition("/")[0]
            grouped.setdefault((source, without_numbers(reason)), []).append(key)
        return dict(sorted(grouped.items(), key=lambda item: -len(item[1])))


class Quarantine:
    """Appends unusable samples, and reads those of all ranks and attempts."""

    def __init__(self, folder: Path) -> None:
        self._journal = JsonLines(folder)

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self._journal.folder

    def add(self, sample: Unusable) -> None:
        """Name a sample. Raises OSError."""
        self._journal.append(asdict(sample))

    def read(self) -> Quarantined:
        """All that were named."""
        lines = self._journal.read()
        return Quarantined([Unusable(**line) for line in lines.values], lines.torn)

    def size(self) -> int:
        """Bytes that it has on disk, to see cheaply whether there is more."""
        return self._journal.size()
