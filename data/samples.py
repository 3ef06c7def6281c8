"""A row of the index -> a decoded, tokenised Sample."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from configs.errors import DataError
from configs.run.crash_journal import POISONED, CrashJournal
from data import storage
from data.augment import Augmentation, Waveform, joined, mixed
from data.batch import NO_MASKS, Sample
from data.captions import CaptionEncoder, Tokens, find_captions
from data.decode import SAMPLE_RATE, BadSample, Skipped, decode, in_words
from data.location import Location
from data.merged import Index
from data.order import CAPTION, CROP, EMPTY, STYLE, Ints, hashed, is_chosen, random_keys
from data.retry import STATS
from data.windows import Windows


@dataclass(frozen=True)
class Rejected:
    """A sample whose content could not be used. `bad` is false where the configuration leaves it out (too
    long)."""

    key: str
    reason: str
    bad: bool

    @property
    def source(self) -> str:
        """Name of its source."""
        return self.key.partition("/")[0]


class Stretch(NamedTuple):
    """Bytes [start, end) of a shard."""

    start: int
    end: int


@dataclass(frozen=True)
class Place:
    """Where the bytes of a sample are. shard: its number in the index."""

    location: Location
    shard: int
    audio: Stretch
    text: Stretch

    @property
    def start(self) -> int:
        """First byte of the sample."""
        return min(self.audio.start, self.text.start)

    @property
    def end(self) -> int:
        """Byte after the last one of the sample."""
        return max(self.audio.end, self.text.end)


class Content(NamedTuple):
    """The members of a sample."""

    audio: bytes
    text: bytes


class Partner(NamedTuple):
    """The clip that is mixed into a sample."""

    row: int
    content: Content


class _Clip(NamedTuple):
    """A clip that was decoded, its caption, the tokens of that, all captions that it has, and the seconds of
    the recording that lie before it."""

    waveform: Waveform
    caption: str
    tokens: Tokens
    references: tuple[str, ...]
    begins: float = 0.0


class SampleReader:
    """Reads the samples of an index. Safe to use from several threads."""

    def __init__(
        self,
        index: Index,
        encoder: CaptionEncoder,
        *,
        windows: Windows,
        max_seconds: float,
        overlong: Literal["skip", "start", "crop"],
        seed: int,
        crash_journal: CrashJournal,
        poisoned: frozenset[str] = frozenset(),
        always_alike: bool = False,
        style_drop: float = 0.0,
        augmentation: Augmentation | None = None,
    ) -> None:
        """crash_journal: notes what is being decoded; poisoned: keys of samples whose decoder must not be
        tried again; always_alike: a crop, and a caption chosen at random, are the same at all steps;
        style_drop: share of the samples that come without their source's style."""
        self.index, self.encoder, self.overlong, self.seed = index, encoder, overlong, seed
        self.windows = windows
        self.always_alike = always_alike
        self.style_drop, self.augmentation = style_drop, augmentation
        self.crash_journal, self.poisoned = crash_journal, poisoned
        self.max_length = round(max_seconds * SAMPLE_RATE)
        names = ("shard", "source", "audio_offset", "audio_size", "text_offset", "text_size", "crc32")
        self._columns = {name: index.column(name) for name in (*names, "caption")}

    def place(self, row: int) -> Place:
        """Where a sample's bytes are."""
        value = {name: int(column[row]) for name, column in self._columns.items()}
        audio = Stretch(value["audio_offset"], value["audio_offset"] + value["audio_size"])
        text = Stretch(value["text_offset"], value["text_offset"] + value["text_size"])
        return Place(self.index.shards[value["shard"]].location, value["shard"], audio, text)

    def load(self, row: int, step: int = 0, epoch: int = 0) -> Sample | Rejected:
        """Read and decode one sample by itself."""
        (partner,) = self.partners(np.array([row]), epoch).tolist()
        mixed_in = None if partner == EMPTY else Partner(partner, self._read(partner))
        return self.build(row, self._read(row), step, epoch, mixed_in)

    def partners(self, rows: Ints, epoch: int) -> Ints:
        """The clip that is mixed into each sample, by its row; EMPTY where none is, and where there is no
        sample."""
        if self.augmentation is None:
            return np.full_like(rows, EMPTY)
        partners = self.augmentation.partners(rows, epoch)
        offset = self._columns["audio_offset"]  # a clip with several captions may stand in several rows
        return np.where(offset[partners] == offset[rows], EMPTY, partners)

    def _read(self, row: int) -> Content:
        place = self.place(row)
        return Content(storage.read(place.location, *place.audio), storage.read(place.location, *place.text))

    def build(
        self, row: int, content: Content, step: int, epoch: int, partner: Partner | None = None
    ) -> Sample | Rejected:
        """Decode a sample from its bytes. A random crop depends on seed, step and sample alone; whether it is
        padded, which caption it has, whether that has a style, and what augmentation makes of it, on seed,
        epoch and sample.

        partner: of `self.partners`. Raises DataError if the bytes are not those that were indexed.
        """
        key, source = self.index.identity(row), int(self._columns["source"][row])
        style: str | None = self.index.shards[int(self._columns["shard"][row])].source.style
        if is_chosen([row], self.style_drop, self.seed, STYLE, epoch):
            style = None
        try:
            clip = self._clip(row, content, step, epoch, style)
        except BadSample as error:
            return Rejected(key, str(error), bad=not isinstance(error, Skipped))
        if partner:
            clip = self._mixed(clip, partner, step, epoch, style)
        waveform, masks = clip.waveform, NO_MASKS
        if self.augmentation:
            waveform = self.augmentation.waveform(waveform, row, epoch)
            masks = self.augmentation.masks(row, epoch)
        frames = int(self.windows.frames([len(waveform)], [row], epoch)[0])
        return Sample(
            waveform,
            clip.tokens,
            clip.caption,
            source,
            key,
            frames,
            masks,
            references=clip.references,
            begins=clip.begins,
        )

    def _clip(self, row: int, content: Content, step: int, epoch: int, style: str | None) -> _Clip:
        """A clip as it was recorded, or the stretch of it that fits. Raises BadSample."""
        shard = self.index.shards[int(self._columns["shard"][row])]
        key = self.index.identity(row)
        if key in self.poisoned:
            raise BadSample(POISONED)
        audio, text = self._sound(row, content)
        captions = find_captions(text, shard.source.caption_keys)
        caption = self._chosen(captions, row, epoch)
        tokens = self.encoder.encode(caption, style)
        begins = 0.0

        def fit(seconds: float) -> tuple[float, float] | None:
            nonlocal begins
            stretch = self._fit(seconds, row, step)
            begins = stretch[0] if stretch else 0.0
            return stretch

        with self.crash_journal.holding(key, shard.location.url):
            whole = decode(audio, self.index.text("ending", row), fit)
        return _Clip(whole[: self.max_length], caption, tokens, tuple(captions), begins)

    def _mixed(self, clip: _Clip, partner: Partner, step: int, epoch: int, style: str | None) -> _Clip:
        """A clip with another one in it; as it is where that cannot be used, cannot be heard beside it, or
        says more than fits."""
        try:
            other = self._clip(partner.row, partner.content, step, epoch, style)
            caption = joined(clip.caption, other.caption)
            tokens = self.encoder.encode(caption, style)
        except BadSample:
            return clip
        waveform = mixed(clip.waveform, other.waveform)
        return clip if waveform is None or tokens.cut else _Clip(waveform, caption, tokens, (caption,))

    def _sound(self, row: int, content: Content) -> Content:
        """The bytes of a sample, read again if they are not what was indexed. Raises DataError."""
        if self._is_sound(row, content):
            return content
        again = self._read(row)  # a bit may have flipped on its way
        STATS["reread"] += 1
        if not self._is_sound(row, again):
            url = self.index.shards[int(self._columns["shard"][row])].location.url
            raise DataError(
                f"{url}: sample {self.index.text('key', row)!r} is not what was indexed (CRC32 differs, read"
                " twice). The shard was changed or damaged: restore it, or index it again with `python -m"
                " tools.index`."
            )
        return again

    def _is_sound(self, row: int, content: Content) -> bool:
        """Whether these bytes have the CRC32 that a full index knows; a quick one knows none."""
        indexed = int(self._columns["crc32"][row])
        return indexed < 0 or zlib.crc32(content.text, zlib.crc32(content.audio)) == indexed

    def _chosen(self, captions: list[str], row: int, epoch: int) -> str:
        """The caption that this sample is about. A random one depends on seed, epoch and sample alone."""
        number = int(self._columns["caption"][row])
        if number >= len(captions):  # only an index that knows no CRC32 lets this pass
            raise BadSample(f"its caption {number + 1} is not there any more: index the shard again")
        source = self.index.shards[int(self._columns["shard"][row])].source
        if source.captions == "random":
            key = int(hashed([row], self.seed, CAPTION, 0 if self.always_alike else epoch)[0])
            number = key * len(captions) >> 64
        return captions[max(0, number)]

    def _fit(self, seconds: float, row: int, step: int) -> tuple[float, float] | None:
        """The stretch of a clip that is used (start, length), None for all of it."""
        longest = self.max_length / SAMPLE_RATE
        if round(seconds * SAMPLE_RATE) <= self.max_length:
            return None
        if self.overlong == "skip":
            raise Skipped(
                f"the audio has {in_words(seconds, longest)} s, {longest:g} s fit (data.overlong: start or"
                " crop would take a part)"
            )
        if self.overlong == "start":
            return 0.0, longest
        key = int(random_keys(1, self.seed, CROP, 0 if self.always_alike else step, row)[0])
        # At whole hundredths of a second, which are whole frames of most rates.
        starts = int((seconds - longest) * 100) + 1
        return (key * starts >> 64) / 100, longest
