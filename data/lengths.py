"""How much of each source is longer than what is used of a clip: counted where the index knows the lengths,
estimated from some clips where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from configs.schema import Data, Source
from data import storage
from data.decode import BadSample, probe
from data.ffmpeg import ENDINGS
from data.index import Sidecar
from data.sources import Shard

CLIPS, CLIPS_FOR_FFMPEG, LEAST_CLIPS = 64, 8, 4
"""Clips of a source that are looked at: at most, at most where FFmpeg must decode them, and at least."""
BYTES = 64 << 20
"""So much of a source is read for it, about."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Clip:
    """The audio of a sample: row `row` of a shard's index."""

    shard: Shard
    sidecar: Sidecar
    row: int

    def value(self, column: str) -> Any:
        """What the index says of it."""
        return self.sidecar.table[column][self.row].as_py()

    def measure(self) -> float:
        """Its length in seconds, read from its content. Raises BadSample."""
        start, size = self.value("audio_offset"), self.value("audio_size")
        location = replace(self.shard.location, tag=self.sidecar.shard.tag, size=self.sidecar.shard.size)
        content = storage.read(location, start, start + size)
        return probe(content, self.value("ending")).seconds

    @property
    def needs_ffmpeg(self) -> bool:
        """Whether FFmpeg has to decode it."""
        return self.value("ending").rsplit(".", 1)[-1] in ENDINGS

    def __str__(self) -> str:
        return f"{self.shard.location.name}/{self.value('key')}"


@dataclass(frozen=True)
class Lengths:
    """What is known of the lengths of a source's clips."""

    seconds: Floats
    """Of all sound ones, or of some of them."""
    clips: int
    """How many sound ones there are."""
    unusable: Sequence[str] = ()
    """KEY: REASON of clips that were looked at and have no length."""

    def lines(self, source: Source, data: Data, longest: float) -> list[str]:
        """What there is to tell if clips of more than `longest` seconds are left out or cut."""
        lines = []
        if self.unusable:
            lines.append(
                f"source {source.name}: {len(self.unusable)} of"
                f" {len(self.unusable) + len(self.seconds)} clips looked at cannot be used, e.g."
                f" {self.unusable[0]}"
            )
        overlong = self.seconds[self.seconds > longest]
        if not len(overlong):
            return lines
        known, hours = len(self.seconds), float(self.seconds.sum())
        is_estimate = known + len(self.unusable) < self.clips
        share = _share(len(overlong), known)
        many = f"{len(overlong):,} of {known:,} clips ({share})"
        if is_estimate:
            many = f"of {known:,} clips looked at (there are {self.clips:,}), {len(overlong):,} ({share})"
        if data.overlong == "skip":
            told = (
                f"{many}, {_part(float(overlong.sum()), hours)}, are longer than {longest:g} s and left"
                " out; data.overlong=start would take the beginning of each"
            )
        else:
            lost = float((overlong - longest).sum())
            told = (
                f"{many} are longer than {longest:g} s and cut (data.overlong={data.overlong}):"
                f" {_part(lost, hours)} lie beyond"
            )
        if is_estimate:
            told += ". This is an estimate; a full index (`python -m tools.index CONFIG`) knows all lengths"
        return [*lines, f"source {source.name}: {told}"]


def tell_lengths(
    data: Data, shards: Sequence[Shard], sidecars: Sequence[Sidecar], longest: float
) -> list[str]:
    """What there is to tell, source by source, of clips that are longer than `longest` seconds. Of a source
    with a quick index some clips are read."""
    parts = list(zip(shards, sidecars, strict=True))
    with ThreadPoolExecutor(storage.REQUESTS) as pool:
        looks = [_look(pool, [part for part in parts if part[0].source is source]) for source in data.sources]
        return [
            line
            for source, look in zip(data.sources, looks, strict=True)
            for line in look.lengths().lines(source, data, longest)
        ]


@dataclass(frozen=True)
class Look:
    """A look at the clips of a source: at what the index knows of all, or into some of them."""

    clips: int
    known: Floats | None
    """(clips,) seconds; None where the index does not know all."""
    under_way: Sequence[tuple[Clip, Future[float]]] = ()
    """Clips whose lengths are being read."""

    def lengths(self) -> Lengths:
        """What it has found."""
        if self.known is not None:
            return Lengths(self.known, self.clips)
        seconds, unusable = [], []
        for clip, measured in self.under_way:
            try:
                seconds.append(measured.result())
            except BadSample as error:
                unusable.append(f"{clip}: {error}")
        return Lengths(np.array(seconds), self.clips, unusable)


def _look(pool: ThreadPoolExecutor, parts: Sequence[tuple[Shard, Sidecar]]) -> Look:
    """Begin to look at the clips of a source."""
    sound = [pc.equal(sidecar.table["problem"], "").to_numpy().nonzero()[0] for _, sidecar in parts]
    known = [
        sidecar.table["seconds"].to_numpy()[rows] for (_, sidecar), rows in zip(parts, sound, strict=True)
    ]
    seconds = np.concatenate(known).astype(np.float64)
    if not np.isnan(seconds).any():
        return Look(len(seconds), seconds)
    ends = np.cumsum([len(rows) for rows in sound])

    def spread(count: int) -> list[Clip]:
        """So many clips, spread evenly."""
        clips = []
        for number in np.unique(np.linspace(0, len(seconds) - 1, count).astype(int)).tolist():
            part = int(np.searchsorted(ends, number, "right"))
            row = int(sound[part][number - ends[part]])  # counted from the end of the part
            clips.append(Clip(*parts[part], row))
        return clips

    clips = spread(CLIPS)
    by_size = CLIPS * BYTES // max(1, sum(clip.value("audio_size") for clip in clips))
    most = CLIPS_FOR_FFMPEG if any(clip.needs_ffmpeg for clip in clips) else CLIPS
    count = max(LEAST_CLIPS, min(by_size, most))
    if count < CLIPS:
        clips = spread(count)
    return Look(len(seconds), None, [(clip, pool.submit(clip.measure)) for clip in clips])


def _part(seconds: float, total: float) -> str:
    """As `13 h of 120 h (11 %)`."""
    return f"{_duration(seconds)} of {_duration(total)} ({_share(seconds, total)})"


def _share(part: float, total: float) -> str:
    """As `4.1 %`, and `0.005 %` where that would be nothing."""
    share = 100 * part / total
    return f"{share:.1f} %" if share >= 0.1 else f"{share:.1g} %"


def _duration(seconds: float) -> str:
    """As `13 h`, `4.5 min`, `8.1 s`."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit:
            amount = seconds / unit
            return f"{amount:,.0f} {name}" if amount >= 10 else f"{amount:.1f} {name}"
    return f"{seconds:.1f} s"
