"""MPEG audio (MP3, MP2): its frames, walked one by one, where its header does not say how many there are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

COMPLETE = 0.9
"""Share of the length in a header that must be there; some encoders of MP3 state it a little off."""
RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
"""Hz, by the version in a frame's header: MPEG 1, 2 and 2.5."""
KILOBITS = {
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""Bits per second / 1000, by whether it is MPEG 1, and layer; then by the index in a frame's header."""
SYNC = re.compile(rb"\xff[\xe2-\xff]")
BLOCK = 1 << 17
BY_CHANCE = 16 << 10
"""Bytes among which two certain ones stand less than once by chance."""
IN_A_ROW = 3
"""Frames, one where the other ends, that are not there by chance."""
JUNK = 64 << 10
"""Bytes before the first frame that are no loss: zeros, what a server said, a tag whose size is not so."""
TAIL = 4096
"""Bytes after the last frame that are no loss: half a frame, an old tag."""
ID3V1 = 128
"""Bytes of the tag at the end that a statement of length does not count."""
TAGS = re.compile(rb"ID3[\x02-\x04]|APETAGEX|TAG|LYRICSBEGIN")
STATED = (b"Xing", b"Info")
SPACIOUS = 0x90
"""Index of a bit rate whose frames have room for a statement of length."""


class Unsound(Exception):
    """Not all of the audio can be read; the message goes on after `the audio`."""


class Frame(NamedTuple):
    """What the header of a frame says. size: in bytes, header included."""

    size: int
    kilobits: int
    form: tuple[int, int, int]
    """Version, layer, rate (Hz): alike in all frames of a file."""


class Statement(NamedTuple):
    """What the first frame of an MP3 says of the file: frames and bytes, 0 where it does not say."""

    frames: int
    size: int


class Run(NamedTuple):
    """Frames of one form, end to end: bytes [start, end)."""

    start: int
    end: int
    frames: int
    frame: Frame
    """The first one."""
    steady: bool
    """Whether all have one bit rate."""


def files(content: bytes) -> list[bytes] | None:
    """The MPEG files that content consists of, end to end, each of which says its length or has a steady bit
    rate; [] if there are no frames, None if only FFmpeg finds their length. Raises Unsound."""
    runs = _runs(content)
    if not runs:
        return []
    lost = max(0, runs[0].start - JUNK)
    groups = [[runs[0]]]
    for before, run in pairwise(runs):
        tag = TAGS.search(content, before.end, min(before.end + TAIL, run.start))
        if tag or run.frame.form != before.frame.form or _statement(content, run.start, run.frame):
            groups.append([run])
        else:
            groups[-1].append(run)
            lost += run.start - before.end
    end = runs[-1].end
    if not TAGS.search(content, end, end + TAIL):
        lost += max(0, len(content) - end - TAIL)
    if lost > (1 - COMPLETE) * len(content):
        raise Unsound(f"is damaged: {lost:,} of its {len(content):,} bytes are no frames of MPEG audio")
    ends = [group[-1].end for group in groups]
    if len(content) - end <= TAIL:
        ends[-1] = len(content)
    whole = [_file(content[group[0].start : end], group) for group, end in zip(groups, ends, strict=True)]
    return None if None in whole else [file for file in whole if file is not None]


def places(content: bytes, pair: bytes) -> Iterator[int]:
    """Where two bytes stand one behind the other: in a tenth of the time that `bytes.find` takes."""
    for start in range(0, len(content) - 1, BLOCK):
        block = np.frombuffer(content, np.uint8, min(BLOCK + 1, len(content) - start), start)
        yield from (np.flatnonzero((block[:-1] == pair[0]) & (block[1:] == pair[1])) + start).tolist()


def says_its_length(content: bytes) -> bool:
    """Whether the first frame, with which content begins, states frames and bytes, and those that are there
    are not more."""
    if not (frame := _frame(content, 0)) or not (said := _statement(content, 0, frame)):
        return False
    if not said.frames or len(content) > said.size + ID3V1:
        return False
    return (
        sum(1 for _ in places(content, content[:2])) <= said.frames / COMPLETE + 1 + len(content) / BY_CHANCE
    )


def _samples(form: tuple[int, int, int]) -> int:
    """Samples in a frame."""
    version, layer, _ = form
    return 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152


def _file(content: bytes, group: list[Run]) -> bytes | None:
    """The bytes of one file, with its length stated where libsndfile would not find it; None if it cannot
    be."""
    first = group[0]
    frames = sum(run.frames for run in group)
    said = _statement(content, 0, first.frame)
    if said and said.frames >= (frames - 1) * COMPLETE:
        return content
    if not said and all(run.steady and run.frame.kilobits == first.frame.kilobits for run in group):
        return content
    if first.frame.form[1] != 3:
        return None
    if said:
        content, frames = content[first.frame.size :], frames - 1
    return _stating(content, frames) + content


def _stating(content: bytes, frames: int) -> bytes:
    """A silent frame that states the number of frames after it, as encoders put it before those."""
    head = bytes([0xFF, content[1] | 1, SPACIOUS | content[2] & 0x0C, content[3]])
    frame = _header(head[1], head[2])
    assert frame is not None
    size = frame.size + len(content)
    numbers = b"".join(number.to_bytes(4, "big") for number in (1 | 2, frames, size))
    return (head + bytes(_side(head, frame)) + STATED[0] + numbers).ljust(frame.size, b"\0")


def _side(head: bytes, frame: Frame) -> int:
    """Bytes between a frame's header and its statement: those of its side information."""
    mono = head[3] >> 6 == 3
    if frame.form[0] == 3:
        return 17 if mono else 32
    return 9 if mono else 17


def _statement(content: bytes, start: int, frame: Frame) -> Statement | None:
    """What the frame at `start` says of its file, None if it is an ordinary one."""
    at = start + 4 + _side(content[start : start + 4], frame)
    if content[at : at + 4] not in STATED:
        return None
    flags = int.from_bytes(content[at + 4 : at + 8], "big")
    numbers = [int.from_bytes(content[at + place : at + place + 4], "big") for place in (8, 12)]
    frames = numbers.pop(0) if flags & 1 else 0
    return Statement(frames, numbers[0] if flags & 2 else 0)


def _runs(content: bytes) -> list[Run]:
    """All frames, in runs."""
    runs: list[Run] = []
    at = 0
    while found := SYNC.search(content, at):
        at = found.start() + 1
        run = _run(content, found.start())
        if run and (run.frames >= IN_A_ROW or run.end == len(content)):
            runs.append(run)
            at = run.end
    return runs


def _run(content: bytes, start: int) -> Run | None:
    """The frames from `start` on, up to one of another form, or one that begins another file."""
    first = frame = _frame(content, start)
    at, frames, steady = start, 0, True
    mono = content[start + 3 : start + 4] >= b"\xc0"
    while (
        first
        and frame
        and frame.form == first.form
        and at + frame.size <= len(content)
        and (content[at + 3] >= 0xC0) == mono
        and not (frames and _statement(content, at, frame))
    ):
        at, frames, steady = at + frame.size, frames + 1, steady and frame.kilobits == first.kilobits
        frame = _frame(content, at)
    return Run(start, at, frames, first, steady) if first and frames else None


def _frame(content: bytes, at: int) -> Frame | None:
    if at + 4 > len(content) or content[at] != 0xFF:
        return None
    return _header(content[at + 1], content[at + 2])


@cache
def _header(second: int, third: int) -> Frame | None:
    """The frame whose header has these two bytes after the first; None if there is none, or its bit rate is
    free."""
    version, layer = second >> 3 & 3, 4 - (second >> 1 & 3)
    bits, rate = third >> 4, third >> 2 & 3
    if second < 0xE0 or version == 1 or layer == 4 or bits in (0, 15) or rate == 3:
        return None
    hertz, kilobits = RATES[version][rate], KILOBITS[version == 3, layer][bits - 1]
    form = (version, layer, hertz)
    slot = 4 if layer == 1 else 1
    size = (_samples(form) // 8 * kilobits * 1000 // hertz // slot + (third >> 1 & 1)) * slot
    return Frame(size, kilobits, form)
