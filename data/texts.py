"""Texts that people wrote, or programs for them: what is no caption is told from what is one."""

from __future__ import annotations

import re
import unicodedata

from data.decode import BadSample
from data.kinds import shown

EMPTY = "the caption is empty"
UNSEEN = (
    " \t\n\r\v\f\0\x1a\x1c\x1d\x1e\x1f\x7f\x85\xa0\xad\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007"
    "\u2008\u2009\u200a\u200b\u200c\u200d\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u202f\u205f"
    "\u2060\u2066\u2067\u2068\u2069\u3000\ufeff"
)
"""Blanks, and what comes along unseen when a text is copied: byte order marks, marks of direction (a file's
properties in Windows have U+202A)."""
NO_VALUE = {"nan", "NaN", "None", "null", "NULL", "NA", "N/A", "n/a", "<NA>"} | {
    f"#{error}" for error in ("N/A", "NAME?", "REF!", "VALUE!", "DIV/0!", "NULL!", "NUM!")
}
"""What programs write where there is nothing."""
LITERAL = re.compile(r"\[\s*(['\"]).*\1\s*\]|\{\s*(['\"]).*\}", re.DOTALL)
"""A list or an object as Python or JSON write it."""


def bare(text: str) -> str:
    """A text without what cannot be seen around it."""
    return text.strip(UNSEEN)


def sound_caption(text: str) -> str:
    """A caption without blanks around it. Raises BadSample for a text that is none, wherever it stands."""
    caption = bare(text)
    if not caption:
        raise BadSample(EMPTY)
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise BadSample("the caption holds half a character (a lone surrogate)")
    if caption in NO_VALUE:
        raise BadSample(f"the caption is {shown(caption)!r}, which programs write where there is none")
    if not any(map(_says_something, caption)):
        raise BadSample(f"the caption is {shown(caption)!r}, without a letter or a digit")
    if LITERAL.fullmatch(caption):
        raise BadSample(
            "the caption is a list or an object that was written as text: take its texts out of it; several"
            " are an array in JSON, and rows in a table"
        )
    return caption


def _says_something(character: str) -> bool:
    """Whether this is a letter, a digit, or a sign as a note or an emoji."""
    return character.isalnum() or unicodedata.category(character) == "So"
