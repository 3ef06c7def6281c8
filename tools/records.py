"""The text of a table as records: the fields between its delimiters, and where its quotation marks are wrong.

Python's csv takes quotation marks anywhere, and one that is open ends with the table: rows would be lost in
silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from configs.errors import DataError
from data.decode import AUDIO_ENDINGS
from data.kinds import shown

NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What Python reads for a byte that is none of UTF-8."""
STAYS_OPEN = re.compile(r'[^"]*(?:""[^"]*)*')
"""A whole line that does not close the field in which it begins."""
UNCLOSED = "a quotation mark opens a field and is not closed"
WITHIN = 'there are quotation marks within a field in quotation marks; write each of them twice ("")'
UNOPENED = "a quotation mark ends a field that begins with none"
DOUBLED = "there are doubled quotation marks in a field that begins with none"


class Dialect:
    """Splits a row into its fields. The text of a field in quotation marks may hold all characters; in others
    quotation marks stand for themselves."""

    def __init__(self, delimiter: str) -> None:
        self.delimiter = delimiter
        blanks = " *" if delimiter == "\t" else "[ \t]*"
        end = rf"{blanks}({re.escape(delimiter)}|\Z)"
        self._blanks = " \t".replace(delimiter, "") or " "
        self._quoted = re.compile(rf'{blanks}"({STAYS_OPEN.pattern})"{end}')
        self._unclosed = re.compile(rf'{blanks}"{STAYS_OPEN.pattern}\Z')
        self._plain = re.compile(rf"([^{re.escape(delimiter)}]*)({re.escape(delimiter)}|\Z)")

    def split(self, text: str) -> tuple[list[str], str]:
        """Fields, and what is wrong with the quotation marks ("" if nothing)."""
        if '"' not in text:
            return text.split(self.delimiter), ""
        fields, wrong, at = [], "", 0
        while True:
            field = self._quoted.match(text, at)
            if field:
                fields.append(field[1].replace('""', '"'))
            else:
                field = self._plain.match(text, at)
                assert field is not None  # it matches anything
                fields.append(field[1])
                wrong = wrong or self._what_is_wrong(text, at, field[1])
            if not field[2]:
                return fields, wrong
            at = field.end()

    def _what_is_wrong(self, text: str, at: int, field: str) -> str:
        """What is wrong with a field that is none in sound quotation marks."""
        if field.lstrip(self._blanks).startswith('"'):
            return UNCLOSED if self._unclosed.match(text, at) else WITHIN
        if '""' in field:
            return DOUBLED
        # `A 12" record` is sound, but `A bell"` has lost a mark, and perhaps more.
        return UNOPENED if field.rstrip().endswith('"') and field.count('"') % 2 else ""


class Record(NamedTuple):
    """A row as it stands in the table: its first and last line, and what is wrong with its quotation marks
    ("" if nothing)."""

    line: int
    end: int
    fields: list[str]
    wrong: str


class Records:
    """Iterates over the records of a table that are not blank."""

    def __init__(self, path: Path, text: TextIO, dialect: Dialect) -> None:
        self.path, self.dialect = path, dialect
        self.columns = 2
        self.place: int | None = None
        """Of the column with the files; unknown before the header is read."""
        self._lines, self._line = text, 0

    def __iter__(self) -> Iterator[Record]:
        while line := self._next():
            if line.replace(self.dialect.delimiter, "").strip():
                yield self._record(line)

    def _next(self) -> str:
        """The next line with its end; "" after the last. Raises DataError."""
        line = self._lines.readline()
        self._line += bool(line)
        if not line.isascii() and (found := NOT_UTF8.search(line)):
            byte = ord(found[0]) - 0xDC00
            raise DataError(
                f"{self.path}, line {self._line}: is not UTF-8 (byte 0x{byte:02x}): save the table as UTF-8"
            )
        return line

    def _record(self, line: str) -> Record:
        """The record that begins with this line. Raises DataError if its end is unclear."""
        first, lines = self._line, [line]
        fields, wrong = self.dialect.split(line.rstrip("\r\n"))
        while wrong == UNCLOSED and (line := self._next()):
            if self._is_row(line):
                raise DataError(
                    f"{self.path}, line {first}: {UNCLOSED} before line {self._line}, which is a row of its"
                    f" own ({shown(line)}). It is unclear where the field ends, so nothing is packed. Close"
                    ' it; in a field in quotation marks, write those of the text twice ("")'
                )
            lines.append(line)
            if not STAYS_OPEN.fullmatch(line):
                fields, wrong = self.dialect.split("".join(lines).rstrip("\r\n"))
        if wrong == UNCLOSED:
            wrong = f"{UNCLOSED} up to the end of the table (line {self._line})"
        return Record(first, self._line, fields, wrong)

    def _is_row(self, line: str) -> bool:
        """Whether a line within quotation marks looks like a whole row."""
        fields, wrong = self.dialect.split(line.rstrip("\r\n"))
        if len(fields) < self.columns:
            return False
        if self.place is None:
            return any(map(is_audio, fields))
        # `barks",a.wav` is how a caption ends; but a line that begins with a file is a row, whatever follows.
        return is_audio(fields[self.place]) and (self.place == 0 or not wrong)


def is_audio(name: str) -> bool:
    """Whether a name has the ending of an audio file."""
    stem, _, ending = name.rstrip(' "').rpartition(".")
    return bool(stem) and ending.lower() in AUDIO_ENDINGS
