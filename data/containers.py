"""What the container of an audio file says, and what is there: sizes that are not so are put right, files end
to end are told apart, and what is no audio says what it is."""

from __future__ import annotations

import re
from collections.abc import Iterator

from data import chunks, flac, mpeg, ogg
from data.kinds import BEGINNING, what_it_is
from data.mpeg import COMPLETE, Unsound

BEHIND_JUNK = 64 << 10
"""Bytes in which the beginning of a known format is looked for."""
CODECS = {1, 2, 3, 6, 7, 0x11, 0x14, 0x31, 0x38, 0x40, 0x55, 0xFFFE}
"""Numbers of the codecs of WAV that libsndfile reads."""
FLAC = re.compile(rb"fLaC[\0\x80]\0\0\x22")
BEGINNINGS = re.compile(
    rb"(RIFF|RIFX|RF64|BW64)....WAVE|FORM....AIF[FC]|OggS\0\x02|fLaC[\0\x80]\0\0\x22", re.DOTALL
)
MAGICS = (b"fLaC", b"OggS", b".snd", *(layout.magic[:4] for layout in chunks.LAYOUTS))
"""What a file of audio begins with, though nothing may follow."""
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
FFMPEGS = re.compile(
    rb"....(ftyp|moov|mdat|wide|free|skip)|\x1a\x45\xdf\xa3|\x30\x26\xb2\x75\x8e\x66\xcf\x11|#!AMR|FLV\x01"
    rb"|\0\0\x01\xba|\x0b\x77|\x7f\xfe\x80\x01|wvpk|MAC |TTA1|MPCK|MP\+|\.RMF|RIFF....AVI |ADIF|tBaK|DSD "
    rb"|G.{187}G.{187}G",
    re.DOTALL,
)
"""MP4 and QuickTime, Matroska and WebM, ASF (WMA), AMR, Flash, MPEG streams, AC-3, DTS, WavPack, ..."""


def files(content: bytes, ffmpegs: bool) -> list[bytes] | None:
    """The files that content consists of, end to end, each so that libsndfile reads it to its end. None:
    FFmpeg has to read it. ffmpegs: whether it is called so, which counts where nothing is known.

    Raises Unsound if there is less than stated, or no audio at all. What nobody knows is left as it is.
    """
    sound = _without_id3(content)
    known = _known(sound)
    if known != []:
        return known
    words = what_it_is(sound)
    silent = not sound[:BEGINNING].strip(b"\0")  # which a file may be before it begins
    is_audio = words.startswith("audio") or sound.startswith(MAGICS)
    if words and not is_audio and not (silent and sound.strip(b"\0")):
        raise Unsound(f"is {words}")
    if found := BEGINNINGS.search(content, 0, BEHIND_JUNK):
        return _known(content[found.start() :])
    for place in (sound, content):  # the size of a tag may be a lie, too
        if (found_frames := mpeg.files(place)) != []:
            return found_frames
    return None if ffmpegs else [sound]


def _known(content: bytes) -> list[bytes] | None:
    """The files of a content whose first bytes say its format; [] for another one."""
    if layout := chunks.layout_of(content):
        if layout.form == b"WAVE" and _codec(content, layout) not in CODECS:
            return None
        return list(chunks.files(content, layout))
    if FLAC.match(content):
        starts = [at for at in mpeg.places(content, b"fL") if FLAC.match(content, at)]
        return [flac.mended(file) for file in _cut(content, starts)]
    if content.startswith(b"OggS"):
        starts = ogg.starts(content)
        return None if content.startswith(ogg.FFMPEGS, 28) else _cut(content, starts)
    if content.startswith(b".snd"):
        return list(_au(content))
    if content[4:8] == b"ftyp":
        _check_boxes(content)
    if content.startswith(EBML):
        _check_segment(content)
    if FFMPEGS.match(content) or _is_adts(content):
        return None
    if mpeg.says_its_length(content):
        return [content]
    return mpeg.files(content) if mpeg.SYNC.match(content) else []


def _codec(content: bytes, layout: chunks.Layout) -> int:
    """The number of a WAV's codec; 1, PCM, where it is not found."""
    at = content.find(b"fmt ", layout.head, BEHIND_JUNK)
    return int.from_bytes(content[at + 8 : at + 10], layout.order) if at >= 0 else 1


def _check_boxes(content: bytes) -> None:
    """Raise Unsound for an MP4 that is cut off, or goes on with another one: FFmpeg reads the beginning."""
    at = 0
    while at + 8 <= len(content):
        size, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(content[at + 8 : at + 16], "big")
        if at and kind == b"ftyp":
            raise Unsound(f"is several MP4 files end to end, the second from byte {at:,} on; take them apart")
        if kind in (b"mdat", b"moov", b"moof") and len(content) < (at + size) * COMPLETE:
            raise Unsound(f"is cut off: {len(content):,} of {at + size:,} bytes are there")
        if size < 8:  # up to the end of the file, or no box
            return
        at += size


def _check_segment(content: bytes) -> None:
    """Raise Unsound for a WebM that is cut off, unless it was written into a pipe and states no size."""
    at = content.find(SEGMENT, 0, BEHIND_JUNK) + len(SEGMENT)
    if at < len(SEGMENT) or at == len(content):
        return
    width = 9 - content[at].bit_length()  # so many zero bits, and a one, come first
    stated = int.from_bytes(content[at : at + width], "big") & (1 << 7 * width) - 1
    end = at + width + stated
    if stated != (1 << 7 * width) - 1 and len(content) < end * COMPLETE:
        raise Unsound(f"is cut off: {len(content):,} of {end:,} bytes are there")


def _cut(content: bytes, starts: list[int]) -> list[bytes]:
    """Content in pieces."""
    if len(starts) == 1:
        return [content]
    return [content[start:end] for start, end in zip(starts, [*starts[1:], len(content)], strict=True)]


def _is_adts(content: bytes) -> bool:
    """Whether this is AAC as it is: two frames, one behind the other."""

    def length(at: int) -> int:
        header = content[at : at + 7]
        if len(header) < 7 or header[0] != 0xFF or header[1] & 0xF6 != 0xF0:
            return 0
        return (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5

    return bool(first := length(0)) and (first >= len(content) or bool(length(first)))


def _au(content: bytes) -> Iterator[bytes]:
    """Each file of AU, with its size put right."""
    while content:
        start, stated = (int.from_bytes(content[at : at + 4], "big") for at in (4, 8))
        there = len(content) - start
        if 0 < stated <= there and content.startswith(b".snd", start + stated):
            yield content[: start + stated]
            content = content[start + stated :]
            continue
        if there < stated * COMPLETE and stated < 0x7FFF_0000:  # beyond, it was written into a pipe
            raise Unsound(f"is cut off: {len(content):,} of {start + stated:,} bytes are there")
        if stated < there * COMPLETE:
            content = content[:8] + max(0, there).to_bytes(4, "big") + content[12:]
        yield content
        return


def _without_id3(content: bytes) -> bytes:
    """The file without its leading ID3 tags: their cover art would count as audio where the length of an MP3
    is estimated from its bytes."""
    start = 0
    while content.startswith(b"ID3", start) and start + 10 <= len(content):
        size = 0
        for byte in content[start + 6 : start + 10]:  # seven bits each
            size = size << 7 | byte & 0x7F
        start += 10 + size
    return content[start:] or content
