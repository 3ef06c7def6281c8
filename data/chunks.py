"""Containers that are made of chunks (WAV, RF64, W64, AIFF, CAF): their sizes are compared with what is
there, and where they are not so the file is written anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from data import mpeg
from data.mpeg import COMPLETE, Unsound

HIDDEN = 64 << 10
"""Bytes in which the audio is looked for behind a chunk whose size is not so."""


@dataclass(frozen=True)
class Layout:
    """How a family of containers lays out its chunks: an identity, a size, the content, padding."""

    magic: bytes
    form: bytes
    """What the bytes before the first chunk end with, in part."""
    order: Literal["little", "big"]
    data: bytes
    """Identity of the chunk that holds the audio."""
    kept: tuple[bytes, ...]
    """Those that are needed to read it."""
    head: int = 12
    """Bytes before the first chunk."""
    size_bytes: int = 4
    align: int = 2
    preface: int = 0
    """Bytes in the data chunk before the audio."""
    inclusive: bool = False
    """Whether a chunk's size counts its identity and size, too."""

    @property
    def form_at(self) -> int:
        """Where the form stands."""
        return self.head - len(self.data)

    @property
    def before(self) -> int:
        """Bytes of a chunk before its content."""
        return len(self.data) + self.size_bytes

    @property
    def has_outer(self) -> bool:
        """Whether the size of the whole stands behind the magic."""
        return self.head >= self.before + len(self.data)

    def number(self, content: bytes, at: int) -> int:
        """A size that stands in content; UNKNOWN where the encoder wrote into a pipe and could not go back to
        put the true one."""
        size = int.from_bytes(content[at : at + self.size_bytes], self.order)
        if size >= (1 << (8 * self.size_bytes - 1)) - 0x10000:
            return UNKNOWN
        return max(0, size - self.before) if self.inclusive else size

    def chunk(self, identity: bytes, body: bytes) -> bytes:
        """A chunk as it is written; of the whole, too, with the magic as its identity."""
        size = len(body) + (self.before if self.inclusive else 0)
        return identity + size.to_bytes(self.size_bytes, self.order) + body + bytes(-len(body) % self.align)


UNKNOWN = -1
W64 = bytes.fromhex("f3acd3118cd100c04f8edb8a")
LAYOUTS = (
    Layout(b"RIFF", b"WAVE", "little", b"data", (b"fmt ",)),
    Layout(b"RIFX", b"WAVE", "big", b"data", (b"fmt ",)),
    Layout(b"RF64", b"WAVE", "little", b"data", (b"fmt ",)),
    Layout(b"BW64", b"WAVE", "little", b"data", (b"fmt ",)),
    Layout(b"FORM", b"AIF", "big", b"SSND", (b"FVER", b"COMM"), preface=8),
    Layout(
        bytes.fromhex("726966662e91cf11a5d628db04c10000"),
        b"wave" + W64,
        "little",
        b"data" + W64,
        (b"fmt " + W64,),
        head=40,
        size_bytes=8,
        align=8,
        inclusive=True,
    ),
    Layout(
        b"caff",
        b"\0\x01",
        "big",
        b"data",
        (b"desc", b"chan", b"kuki", b"pakt"),
        head=8,
        size_bytes=8,
        align=1,
        preface=4,
    ),
)
LONG = (b"RF64", b"BW64")
"""Their sizes of 64 bits stand in a chunk `ds64`; written anew they are ordinary ones (RIFF)."""
REMARKS = tuple(
    b"LIST,JUNK,junk,PAD ,FLLR,bext,iXML,axml,_PMX,id3 ,ID3 ,fact,cue ,smpl,inst,PEAK".split(b",")
)
"""Chunks that often stand behind the audio, and are none of it even where their own size is a lie."""


class Chunk(NamedTuple):
    """One chunk: its identity, and where its content begins; size: as it is stated."""

    identity: bytes
    start: int
    size: int


class _Walk(NamedTuple):
    """The chunks of a file, as far as they go on; regular: with padding where it should be."""

    chunks: list[Chunk]
    end: int
    regular: bool


def layout_of(content: bytes) -> Layout | None:
    """How a file lays out its chunks, None if it has none."""
    for layout in LAYOUTS:
        if content.startswith(layout.magic) and content.startswith(layout.form, layout.form_at):
            return layout
    return None


def files(content: bytes, layout: Layout) -> Iterator[bytes]:
    """Each file of chunks: as it is where its sizes are so, else written anew."""
    while content:
        walk = _walk(content, layout)
        data = next((chunk for chunk in walk.chunks if chunk.identity == layout.data), None)
        hidden = data is None
        data = data or _hidden(content, layout, walk)
        if data is None:
            yield content  # libsndfile says what is wrong
            return
        there = len(content) - data.start
        size = _audio_bytes(content, layout, walk, data)
        if hidden or not walk.regular or size != data.size or layout.magic == b"BW64":
            end = content.find(layout.magic, data.start)
            if end < 0 or layout_of(content[end : end + layout.head]) is not layout:
                end = len(content)
            yield _anew(content[:end], layout, walk.chunks, data, min(size, end - data.start))
            content = content[end:]
            continue
        more = content.startswith(layout.magic, walk.end) and size < there
        yield content[: walk.end] if more else content
        content = content[walk.end :] if more else b""


def _audio_bytes(content: bytes, layout: Layout, walk: _Walk, data: Chunk) -> int:
    """Bytes that the data chunk has. Raises Unsound if fewer are there than it should have."""
    there = len(content) - data.start
    outer_end = _outer(content, layout, walk)
    if data.size == UNKNOWN:
        return there
    if data.size > there:
        covers = outer_end != UNKNOWN and data.start < outer_end <= len(content) + layout.align
        if covers or there >= data.size * COMPLETE:
            return there
        raise Unsound(f"is cut off: {len(content):,} of {data.start + data.size:,} bytes are there")
    rest = content[walk.end :]
    if rest.startswith(layout.magic) or len(rest) < layout.before:
        return data.size
    if data.size <= layout.preface:
        return there
    is_remark = rest.startswith(REMARKS) or mpeg.TAGS.match(rest) or not rest.strip(b"\0")
    if is_remark or len(rest) <= (1 - COMPLETE) * len(content):
        return data.size
    if data.start < outer_end <= walk.end + layout.align:
        raise Unsound(
            f"goes on where it should end by its header: {walk.end:,} of {len(content):,} bytes are stated"
            " (a recorder that was switched off?); write its header anew"
        )
    return there


def _outer(content: bytes, layout: Layout, walk: _Walk) -> int:
    """Where the file ends by the size of the whole, or UNKNOWN."""
    if not layout.has_outer:
        return UNKNOWN
    size = layout.number(content, len(layout.magic))
    if layout.magic in LONG and size == UNKNOWN:
        size = next((_long(content, chunk, 0) for chunk in walk.chunks if chunk.identity == b"ds64"), UNKNOWN)
    return size if size == UNKNOWN else size + layout.before


def _long(content: bytes, chunk: Chunk, place: int) -> int:
    """A size in a chunk `ds64`."""
    size = int.from_bytes(content[chunk.start + place : chunk.start + place + 8], "little")
    return UNKNOWN if size >= 1 << 62 else size


def _walk(content: bytes, layout: Layout) -> _Walk:
    """Follow the chunks of a file up to its end, or to what is no chunk."""
    chunks: list[Chunk] = []
    at, regular = layout.head, True
    while _is_chunk(content, layout, at):
        identity = content[at : at + len(layout.data)]
        chunk = Chunk(identity, at + layout.before, layout.number(content, at + len(identity)))
        if chunk.size == UNKNOWN and layout.magic in LONG and chunks and chunks[0].identity == b"ds64":
            chunk = chunk._replace(size=_long(content, chunks[0], 8))
        if not 0 <= chunk.size <= len(content) - chunk.start:
            if identity == layout.data:
                chunks.append(chunk)
            break
        chunks.append(chunk)
        end = chunk.start + chunk.size
        at = end + -end % layout.align
        if at != end and not _is_chunk(content, layout, at) and _is_chunk(content, layout, end):
            at, regular = end, False
    return _Walk(chunks, min(at, len(content)), regular)


def _is_chunk(content: bytes, layout: Layout, at: int) -> bool:
    """Whether a chunk of this file may begin here."""
    name = content[at : at + 4]
    whole = at + layout.before <= len(content) and not content.startswith(layout.magic, at)
    return whole and name.isascii() and name.decode().isprintable()


def _hidden(content: bytes, layout: Layout, walk: _Walk) -> Chunk | None:
    """The data chunk behind one whose size is not so."""
    after = max((chunk.start for chunk in walk.chunks if chunk.identity in layout.kept), default=0)
    at = content.find(layout.data, after, after + HIDDEN) if after else -1
    while at >= 0:
        start = at + layout.before
        size = layout.number(content, at + len(layout.data))
        if size == UNKNOWN or 0 < size <= len(content) - start:
            return Chunk(layout.data, start, size)
        at = content.find(layout.data, at + 1, after + HIDDEN)
    return None


def _anew(content: bytes, layout: Layout, chunks: list[Chunk], data: Chunk, size: int) -> bytes:
    """The file with nothing but what is needed to read `size` bytes of audio."""
    end = data.start - layout.before
    kept = [
        layout.chunk(chunk.identity, content[chunk.start : min(chunk.start + chunk.size, end)])
        for chunk in chunks
        if chunk.identity in layout.kept
    ]
    body = b"".join([*kept, layout.chunk(layout.data, content[data.start : data.start + size])])
    if not layout.has_outer:
        return content[: layout.head] + body
    form = content[layout.form_at : layout.head]
    return layout.chunk(b"RIFF" if layout.magic in LONG else layout.magic, form + body)
