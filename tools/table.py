"""Tables of clips, read strictly: a row that cannot be right is named, not taken as far as it goes."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from configs.errors import DataError
from data.kinds import BEGINNING, shown, what_it_is
from data.texts import bare
from tools.records import Dialect, Record, Records, is_audio

FILE, CAPTION = "file", "caption"
"""Columns that a table must have."""
DELIMITERS = {",": "','", ";": "';'", "\t": "tab", "|": "'|'"}
"""What usually stands between fields, as it is written behind --delimiter."""
ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is the beginning of this one
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",  # as Excel writes `Unicode Text`
    codecs.BOM_UTF16_BE: "utf-16",
}
"""By byte order mark; all else is UTF-8."""
MANY = 0.1
"""Share of rows with faults beyond which these are no accidents, unless it is one row only."""
SHOWN = 10
"""Rows that are named where nothing is packed."""
HEADER_AGAIN = "it is the header once more"
HAS_ENDING = re.compile(r"\.[A-Za-z]\w{0,4}\W*$")
"""A name that is one of a file, of whatever kind."""


class Row(NamedTuple):
    """A row that is sound: its first line, and a value for each column."""

    line: int
    values: tuple[str, ...]


class Rejection(NamedTuple):
    """A row that is not packed: its first line, and why."""

    line: int
    file: str
    reason: str


@dataclass(frozen=True)
class Table:
    """A whole table, judged. `rejected`: the rows that cannot be right."""

    columns: list[str]
    rows: list[Row]
    rejected: list[Rejection]


def read_table(path: Path, needed: Sequence[str] = (FILE, CAPTION), delimiter: str = ",") -> Table:
    """Read a table that has the columns `needed`. Raises DataError if it has not, if many rows cannot be
    right, or if it is unclear where one ends."""
    try:
        with path.open("rb") as file:
            beginning = file.read(BEGINNING)
        encoding = next((name for mark, name in ENCODINGS.items() if beginning.startswith(mark)), "utf-8-sig")
        errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"  # finds the line, see Records
        with path.open(newline="", encoding=encoding, errors=errors) as text:
            return _judge(Records(path, text, Dialect(delimiter)), needed)
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot read it as a table: {error}") from None
    except _NoHeader as reason:
        what = what_it_is(beginning)
        is_other = what and not what.startswith("text")
        raise DataError(f"{path}: no CSV: it is {what}" if is_other else f"{path}{reason}") from None


class _NoHeader(Exception):
    """What should be a header is none; the message stands behind the path."""


def _header(records: Records, needed: Sequence[str]) -> list[str]:
    """The names of the columns. Raises _NoHeader."""
    delimiter = records.dialect.delimiter
    for header in records:
        text = delimiter.join(header.fields)
        if not re.fullmatch("sep=.?", text):  # a line that tells Excel the delimiter
            break
    else:
        raise _NoHeader(": is empty")
    where = f", line {header.line}: "
    if "\0" in text:
        raise _NoHeader(f"{where}holds zero bytes: is it UTF-16 without a byte order mark? Save it as UTF-8")
    names = _names(header.fields)
    missing = [name for name in needed if name not in names]
    for other, option in DELIMITERS.items():
        if missing and set(needed) <= set(_names(Dialect(other).split(text)[0])):
            raise _NoHeader(f"{where}this table is separated by {option}; add --delimiter {option}")
    if missing and any(map(is_audio, names)):
        raise _NoHeader(
            f"{where}is a row already; the first line must name the columns, e.g. {','.join(needed)}"
        )
    if missing:
        raise _NoHeader(f"{where}no column {', '.join(missing)}; it has {', '.join(names)}")
    if header.wrong:
        raise _NoHeader(f"{where}{header.wrong}")
    twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if twice:
        raise _NoHeader(
            f"{where}there is more than one column {', '.join(twice)}; rename or remove the others"
        )
    return names


def _names(fields: Sequence[str]) -> list[str]:
    return [bare(field) for field in fields]


class _Columns:
    """Judges records by the header."""

    def __init__(self, names: Sequence[str], delimiter: str) -> None:
        self.names, self.place, self._header = names, names.index(FILE), list(names)
        self.named = [place for place, name in enumerate(names) if name or not place]
        """Places that count: not columns without a name, unless it is the first, an index of pandas."""
        self._unnamed = sorted({*range(len(names))} - {*self.named})
        self._option = option_of(delimiter)

    def what_is_wrong(self, record: Record) -> str:
        """Why a record cannot be a row; "" if it can."""
        fields, of = record.fields, f"the header has {len(self.names)}"
        if record.wrong:
            return f"lines {record.line} to {record.end}: " * (record.end > record.line) + record.wrong
        if any("\0" in field for field in fields):
            return "it holds a zero byte"
        if _names(fields) == self._header:
            return HEADER_AGAIN
        if len(fields) > len(self.names):
            return (
                f"it has {len(fields)} fields, {of}: is a {self._option} in a field without quotation marks?"
            )
        if len(fields) < len(self.names):
            return f"it has {len(fields)} fields, {of}: is it broken by the end of a line?"
        if any(fields[place].strip() for place in self._unnamed):
            return "one of its fields is in a column without a name"
        return ""

    def is_piece(self, record: Record) -> bool:
        """Whether a record may be a piece of a broken row: where the file should be, there is other text."""
        if record.wrong or len(record.fields) != len(self.names):
            return not is_audio("".join(record.fields[self.place : self.place + 1]))
        name = record.fields[self.place].strip()
        return bool(name) and not HAS_ENDING.search(name)

    def are_those_of_a_row(self, fields: Sequence[str]) -> bool:
        """Whether there is a field for each column, and the name of an audio file where it should be."""
        return len(fields) == len(self.names) and is_audio(fields[self.place])

    def row(self, record: Record) -> Row:
        """A sound record as a row."""
        return Row(record.line, tuple(record.fields[place] for place in self.named))

    def file_of(self, row: Row) -> str:
        """The file that a row names."""
        return row.values[self.named.index(self.place)]

    def rejection(self, record: Record, reason: str) -> Rejection:
        """A record as a rejected row."""
        return Rejection(record.line, "".join(record.fields[self.place : self.place + 1]), reason)


def _judge(records: Records, needed: Sequence[str]) -> Table:
    """Tell the rows that are sound from those that cannot be right. Raises DataError if these are many."""
    columns = _Columns(_header(records, needed), records.dialect.delimiter)
    records.columns, records.place = len(columns.names), columns.place
    rows: list[Row] = []
    rejected: list[Rejection] = []
    faults: list[Record] = []
    before: Record | None = None
    was_sound = was_piece = False
    for record in records:
        wrong, is_piece = columns.what_is_wrong(record), columns.is_piece(record)
        # Captions are broken, files are not: a row that begins or ends with its file is whole there.
        if wrong == HEADER_AGAIN:  # of tables that were put together: the row before it is whole
            rejected.append(columns.rejection(record, wrong))
            was_sound = was_piece = False
            continue
        is_rest = was_sound and is_piece and columns.place < len(columns.names) - 1
        if wrong or is_rest:
            faults.append(record)
        if is_rest:
            # A row without a file may be a piece of the row before it, too.
            while rows and (cut := rows.pop()):
                why = f"its end may be line {record.line}, which is no row"
                rejected.append(Rejection(cut.line, columns.file_of(cut), why))
                if columns.file_of(cut).strip():
                    break
        if before and was_piece and columns.place:
            wrong = wrong or f"its beginning may be line {before.line}, which is no row"
        if wrong:
            rejected.append(columns.rejection(record, wrong))
        else:
            rows.append(columns.row(record))
        before, was_sound, was_piece = record, not wrong and not is_piece, is_piece
    if not rows and not rejected:
        raise DataError(f"{records.path}: no row could be packed: there is none below the header")
    if len(faults) > max(1, MANY * (len(rows) + len(rejected))):
        raise DataError(_refusal(records, columns, rejected, len(rows), faults))
    table = Table([columns.names[place] for place in columns.named], rows, sorted(rejected))
    _check_marks(records.path, table)
    return table


def _check_marks(path: Path, table: Table) -> None:
    """Raise DataError where single quotation marks stand around all captions: they are none of CSV's, and
    would be learnt."""
    place = table.columns.index(CAPTION) if CAPTION in table.columns else 0
    captions = [row.values[place].strip() for row in table.rows]
    if len(captions) > 1 and all(re.fullmatch(r"'.*'", caption, re.DOTALL) for caption in captions):
        raise DataError(
            f"{path}: all {len(captions)} captions stand in single quotation marks, which would be learnt,"
            f" too ({shown(captions[0])}): CSV has double ones, or none; write it again without them"
        )


def _refusal(
    records: Records, columns: _Columns, rejected: Sequence[Rejection], sound: int, faults: Sequence[Record]
) -> str:
    """Names rows that cannot be right, and what may be wrong with all of them."""
    listed = "".join(
        f"\n  line {row.line}: {row.file or '(no file)'}: {row.reason}" for row in rejected[:SHOWN]
    )
    more = f"\n  and {len(rejected) - SHOWN} more" if len(rejected) > SHOWN else ""
    delimiter = records.dialect.delimiter
    for other in DELIMITERS:
        splits = (Dialect(other).split(delimiter.join(fault.fields))[0] for fault in faults)
        if other != delimiter and all(map(columns.are_those_of_a_row, splits)):
            advice = f"They are separated by {option_of(other)}, but the header by {option_of(delimiter)}"
            break
    else:
        advice = (
            f"Captions with a {option_of(delimiter)}, quotation marks or a line break need quotation marks"
            f' around them, and those within twice: a.wav{delimiter}"A dog{delimiter} and ""hello"""'
        )
    return (
        f"{records.path}: {len(rejected)} of {sound + len(rejected)} rows cannot be right, so nothing is"
        f" packed:{listed}{more}\n{advice}"
    )


def option_of(delimiter: str) -> str:
    """A delimiter as it is written behind --delimiter."""
    return DELIMITERS.get(delimiter, repr(delimiter))
