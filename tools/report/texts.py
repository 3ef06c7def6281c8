"""Captions as pieces: loops that are folded, words that are new."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

LOOP = re.compile(r"(\S.{0,79}?)\1{3,}", re.DOTALL)
"""The same again and again, up to 80 characters long, at least four times."""
LONG = 40
"""Characters from which on a loop is folded."""


@dataclass(frozen=True)
class Piece:
    """A part of a caption. folded: what a loop says again and again, empty for other text; times: how often;
    is_new: whether the caption before has not said it."""

    text: str
    folded: str = ""
    times: int = 1
    is_new: bool = False


def pieces(caption: str, before: str | None = None) -> list[Piece]:
    """A caption, with its loops folded and what is not in the one before marked."""
    words = list(_words(caption))
    if before is not None:
        known = [_same(word) for word in _words(before)]
        matcher = SequenceMatcher(None, known, [_same(word) for word in words], autojunk=False)
        for kind, _, _, first, end in matcher.get_opcodes():
            if kind != "equal":
                words[first:end] = [replace(word, is_new=True) for word in words[first:end]]
    return _joined(words)


def _words(caption: str) -> Iterator[Piece]:
    """Words with the blanks behind them, and loops."""
    at, padded = 0, f"{caption} "  # so that the last of a loop is like the others
    for loop in LOOP.finditer(padded):
        if len(loop[0]) >= LONG:
            yield from map(Piece, re.findall(r"\s*\S+\s*", padded[at : loop.start()]))
            unit = loop[1].strip()
            yield Piece(loop[0], folded=unit, times=len(loop[0]) // len(loop[1]))
            at = loop.end()
    yield from map(Piece, re.findall(r"\s*\S+\s*", padded[at:-1]))


def _same(word: Piece) -> tuple[str, bool]:
    """What words have in common that are alike, as loops are that go on for longer."""
    return word.folded or word.text.strip(), bool(word.folded)


def _joined(words: Sequence[Piece]) -> list[Piece]:
    """Fewer pieces: words that are alike new as one."""
    joined: list[Piece] = []
    for word in words:
        last = joined[-1] if joined else word
        if joined and not word.folded and not last.folded and word.is_new == last.is_new:
            joined[-1] = replace(last, text=last.text + word.text)
        else:
            joined.append(word)
    return joined
