"""A row of the index -> a decoded, tokenised Sample."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

from configs.errors import DataError
from data import storage
from data.batch import Sample
from data.captions import CaptionEncoder, find_caption
from data.decode import SAMPLE_RATE, BadSample, Skipped, decode
from data.in_hand import POISONED, InHand
from data.index import Index
from data.location import Location
from data.order import CROP, random_keys
from data.retry import STATS


@dataclass(frozen=True)
class Rejected:
    """A sample whose content could not be used. `bad` is false where the configuration leaves it out (too
    long)."""

    key: str
    reason: str
    bad: bool


@dataclass(frozen=True)
class Place:
    """Where a sample's bytes are in its shard: audio and text as (start, end)."""

    location: Location
    shard: int
    audio: tuple[int, int]
    text: tuple[int, int]

    @property
    def start(self) -> int:
        """First byte of the sample."""
        return min(self.audio[0], self.text[0])

    @property
    def end(self) -> int:
        """Byte after the last one of the sample."""
        return max(self.audio[1], self.text[1])


class Samples:
    """Reads the samples of an index. Safe to use from several threads."""

    def __init__(
        self,
        index: Index,
        encoder: CaptionEncoder,
        *,
        max_seconds: float,
        overlong: Literal["skip", "crop"],
        seed: int,
        in_hand: InHand,
        poisoned: frozenset[str] = frozenset(),
        same_crops: bool = False,
    ) -> None:
        """in_hand: where to note what is being decoded; poisoned: keys of samples whose decoder must not be
        tried again; same_crops: an overlong clip is cropped alike at all steps."""
        self.index, self.encoder, self.overlong, self.seed = index, encoder, overlong, seed
        self.same_crops = same_crops
        self.in_hand, self.poisoned = in_hand, poisoned
        self.max_length = round(max_seconds * SAMPLE_RATE)
        names = ("shard", "source", "audio_offset", "audio_size", "text_offset", "text_size", "crc32")
        self._columns = {name: index.column(name) for name in names}

    def place(self, row: int) -> Place:
        """Where a sample's bytes are."""
        value = {name: int(column[row]) for name, column in self._columns.items()}
        audio = (value["audio_offset"], value["audio_offset"] + value["audio_size"])
        text = (value["text_offset"], value["text_offset"] + value["text_size"])
        return Place(self.index.shards[value["shard"]].location, value["shard"], audio, text)

    def load(self, row: int, step: int = 0) -> Sample | Rejected:
        """Read and decode one sample by itself."""
        return self.build(row, *self._read(row), step)

    def _read(self, row: int) -> tuple[bytes, bytes]:
        place = self.place(row)
        return storage.read(place.location, *place.audio), storage.read(place.location, *place.text)

    def build(self, row: int, audio: bytes, text: bytes, step: int) -> Sample | Rejected:
        """Decode a sample from its bytes; a random crop depends on seed, step and sample alone.

        Raises DataError if the bytes are not those that were indexed.
        """
        index, expected = self.index, int(self._columns["crc32"][row])
        shard = index.shards[int(self._columns["shard"][row])]
        key = index.identity(row)
        if key in self.poisoned:
            return Rejected(key, POISONED, bad=True)
        if expected >= 0 and zlib.crc32(text, zlib.crc32(audio)) != expected:
            audio, text = self._read(row)  # a bit may have flipped on its way
            STATS["reread"] += 1
            if zlib.crc32(text, zlib.crc32(audio)) != expected:
                raise DataError(
                    f"{shard.location.url}: sample {index.text('key', row)!r} is not what was indexed (CRC32"
                    " differs, read twice). The shard was changed or damaged: restore it, or index it again"
                    " with `python -m tools.index`."
                )
        try:
            caption = find_caption(text, shard.source.caption_key)
            tokens = self.encoder.encode(caption, shard.source.style)
            with self.in_hand.holding(key, shard.location.url):
                waveform = decode(
                    audio, index.text("ending", row), lambda seconds: self._fit(seconds, row, step)
                )[: self.max_length]
        except BadSample as error:
            return Rejected(key, str(error), bad=not isinstance(error, Skipped))
        return Sample(waveform, tokens, caption, int(self._columns["source"][row]), key)

    def _fit(self, seconds: float, row: int, step: int) -> tuple[float, float] | None:
        """The stretch of a clip that is used (start, length), None for all of it."""
        longest = self.max_length / SAMPLE_RATE
        if round(seconds * SAMPLE_RATE) <= self.max_length:
            return None
        if self.overlong == "skip":
            raise Skipped(
                f"the audio has {seconds:.1f} s, {longest:g} s fit (data.overlong: crop would take a part)"
            )
        # At whole hundredths of a second, which are whole frames of most rates.
        last = int((seconds - longest) * 100)
        key = int(random_keys(1, self.seed, CROP, 0 if self.same_crops else step, row)[0])
        return (key * (last + 1) >> 64) / 100, longest
