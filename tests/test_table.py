"""No row of a table loses a part in silence: it is read as it was written, or named."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.errors import DataError
from tools.records import is_audio
from tools.table import Table, read_table

fields = st.text(st.sampled_from("ab Zé漢\u2028\t.'\",;|\n\r"), max_size=12).filter(str.strip)
layouts = st.permutations(["file", "caption", "note"]) | st.permutations(["file", "caption"])
writers = st.fixed_dictionaries(
    {
        "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
        "lineterminator": st.sampled_from(["\n", "\r\n"]),
        "delimiter": st.sampled_from([",", ";", "\t", "|"]),
    }
)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[str]], dict[str, object]]:
    """A header and rows, and how they are written."""
    columns, how = draw(layouts), draw(writers)
    rows = draw(
        st.lists(st.lists(fields, min_size=len(columns), max_size=len(columns)), min_size=1, max_size=4)
    )
    for number, row in enumerate(rows):
        row[columns.index("file")] = f"{number}.wav"
        if how["lineterminator"] == "\n":  # Python 3.11's csv does not quote a \r then
            row[:] = [field.replace("\r", " ") for field in row]
    return [columns, *rows], how


def written(rows: Iterable[Iterable[str]], how: dict[str, object]) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, **how).writerows(rows)
    return file.getvalue()


def read(folder: Path, content: str | bytes, delimiter: str = ",") -> Table:
    path = folder / "clips.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(path, delimiter=delimiter)


def rows_of(table: Table) -> list[list[str]]:
    return [list(row.values) for row in table.rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@given(tables())
@settings(max_examples=200, derandomize=True, deadline=None)
def test_what_csv_writes_is_read_as_it_was(folder: Path, made: tuple[list[list[str]], dict]) -> None:
    (columns, *rows), how = made
    table = read(folder, written([columns, *rows], how), how["delimiter"])
    assert (table.columns, rows_of(table), table.rejected) == (columns, rows, [])


def holds(text: str, other: str) -> bool:
    """Whether all characters of `other`, but one, stand in `text` in this order."""

    def is_within(part: str) -> bool:
        rest = iter(text)
        return all(character in rest for character in part)

    return is_within(other) or any(is_within(other[:at] + other[at + 1 :]) for at in range(len(other)))


def is_like(new: Iterable[str], old: Iterable[str], put: str) -> bool:
    """Whether at most one field differs, by one character that was removed, and by `put` (and by its own
    quotation marks, where that stands before them). Blanks do not count."""
    pairs = [
        ("".join(before.split()), "".join(after.split())) for before, after in zip(old, new, strict=True)
    ]
    different = [(before, after) for before, after in pairs if before != after]
    return not different or (
        len(different) == 1
        and holds(different[0][1], different[0][0])
        and len(different[0][1]) <= len(different[0][0]) + (3 if put else 0)
    )


def damages(text: str, delimiter: str) -> Iterator[tuple[str, str]]:
    """The text with one character removed, put in, or replaced, at any place; and what was put."""
    for at in range(len(text) + 1):
        for put in ('"', delimiter, "\n", "\r", "x", " ", "\0", ""):
            yield text[:at] + put + text[at:], put
            yield text[:at] + put + text[at + 1 :], put


@given(tables())
@example(([["file", "caption", "note"], ["0.wav", ";", ",,;\n"]], {"delimiter": ",", "lineterminator": "\n"}))
@settings(max_examples=20, derandomize=True, deadline=None)
def test_one_wrong_character_costs_no_part_of_a_row_in_silence(
    folder: Path, made: tuple[list[list[str]], dict]
) -> None:
    """Each row that is taken is one that was written, but for that character; those that are missing are
    named."""
    (columns, *rows), how = made
    place = columns.index("file")
    texts = [row[:place] + row[place + 1 :] for row in rows]
    for damaged, put in damages(written([columns, *rows], how), how["delimiter"]):
        try:
            table = read(folder, damaged, how["delimiter"])
        except DataError:
            continue
        if not table.rejected:
            assert len(table.columns) == len(columns)
            assert len(table.rows) == len(rows)
            assert all(is_like(new, old, put) for new, old in zip(rows_of(table), rows, strict=True)), damaged
        for row in rows_of(table):
            taken = row[:place] + row[place + 1 :]
            names_a_file = is_audio(row[table.columns.index("file")])  # tools.pack names those that do not
            assert not names_a_file or any(is_like(taken, old, put) for old in texts), damaged
        assert len(table.rows) + len(table.rejected) >= len(rows) - 1


SOUND = "".join(f"{number}.wav,Sound {number}\n" for number in range(10, 40))
"""Rows beside which a single fault is an accident."""


@pytest.mark.parametrize(
    ("rows", "lines", "reason"),
    [
        ("a.wav,A dog, barking\n", [2], "it has 3 fields, the header has 2: is a ',' in a field without"),
        ('a.wav,"He said "hi" to us"\n', [2], "quotation marks within a field in quotation marks"),
        ('a.wav,He said ""hi"" to us\n', [2], "doubled quotation marks in a field that begins with none"),
        ('a.wav,A dog"\n', [2], "a quotation mark ends a field that begins with none"),
        ('a.wav,"One\nHe said "hi""\n', [2], "lines 2 to 3: there are quotation marks within"),
        ("a.wav,A dog\nbarks\n", [2, 3], "its end may be line 3, which is no row"),
        ("a.wav,A dog\n\nbarks, loudly\n", [2], "its end may be line 4, which is no row"),
        ("a.wav,A dog\rbarks\n", [2, 3], "its end may be line 3"),
        ("a.wav\n", [2], "it has 1 fields, the header has 2"),
        ("a.wav,A \0 dog\n", [2], "it holds a zero byte"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_right_is_named_and_the_others_are_taken(
    tmp_path: Path, rows: str, lines: list[int], reason: str
) -> None:
    table = read(tmp_path, f"file,caption\n{rows}{SOUND}")
    assert [row.line for row in table.rejected] == lines
    assert reason in table.rejected[0].reason and table.rejected[0].file == "a.wav"
    sound = [row for row in rows_of(table) if row[0] in SOUND]
    assert sound == [[f"{number}.wav", f"Sound {number}"] for number in range(10, 40)]


def test_an_open_quotation_mark_at_the_end_costs_its_own_row_only(tmp_path: Path) -> None:
    table = read(tmp_path, f'file,caption\n{SOUND}a.wav,"A dog\nthat barks\n')
    assert len(table.rows) == 30 and [(row.line, row.file) for row in table.rejected] == [(32, "a.wav")]
    assert "not closed up to the end of the table (line 33)" in table.rejected[0].reason


def test_a_broken_caption_before_the_file_costs_both_pieces(tmp_path: Path) -> None:
    table = read(tmp_path, "caption,file\nA dog\nbarks,a.wav\nA bell,b.wav\n")
    assert rows_of(table) == [["A bell", "b.wav"]]
    assert [(row.line, row.file) for row in table.rejected] == [(2, ""), (3, "a.wav")]
    assert "its beginning may be line 2, which is no row" in table.rejected[1].reason


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        (b'file,caption\na.wav,"A dog,\nthat barks"\n', "A dog,\nthat barks"),
        (b'file,caption\na.wav,"He said ""hi"", twice"\n', 'He said "hi", twice'),
        (b'file,caption\na.wav, "A dog, barking" \n', "A dog, barking"),
        (b'file,caption\na.wav,A 12" record\n', 'A 12" record'),
        (b'file,caption\na.wav,He said "hi"\n', 'He said "hi"'),
        (b"\n\n file , caption \na.wav,A dog\n\n,\n", "A dog"),
        (b"\xef\xbb\xbffile,caption\r\na.wav,A dog\r\n", "A dog"),
        (b"file,caption\ra.wav,A dog\r", "A dog"),
        ("file,caption\na.wav,Köln\n".encode("utf-16"), "Köln"),
        ("\ufefffile,caption\na.wav,Köln\n".encode("utf-16-be"), "Köln"),
        (b"\xef\xbb\xbf\xef\xbb\xbffile,caption\na.wav,A dog\n", "A dog"),
        (b'file,caption\na.wav,\t"A dog, barking"\t\n', "A dog, barking"),
        (b"sep=,\nfile,caption\na.wav,A dog\n", "A dog"),
        (b"file,caption,,\na.wav,A dog,,\n", "A dog"),
        ("file,caption\na.wav,A\u2028dog\x0b\x85\n".encode(), "A\u2028dog\x0b\x85"),
        (f'file,caption\na.wav,"{"A dog, " * 40_000}"\n'.encode(), "A dog, " * 40_000),
    ],
)  # fmt: skip
def test_habits_of_programs_that_write_tables_are_read(tmp_path: Path, content: bytes, caption: str) -> None:
    table = read(tmp_path, content)
    assert (table.columns, rows_of(table), table.rejected) == (["file", "caption"], [["a.wav", caption]], [])


def test_the_header_of_a_table_that_was_put_behind_another_costs_no_row(tmp_path: Path) -> None:
    table = read(tmp_path, "file,caption\na.wav,A dog\n\ufefffile, caption\nb.wav,A cat\n")
    assert rows_of(table) == [["a.wav", "A dog"], ["b.wav", "A cat"]]
    assert [(row.line, row.reason) for row in table.rejected] == [(3, "it is the header once more")]


def test_an_index_of_pandas_is_a_column_without_a_name(tmp_path: Path) -> None:
    table = read(tmp_path, ",file,caption\n0,a.wav,A dog\n")
    assert (table.columns, rows_of(table)) == (["", "file", "caption"], [["0", "a.wav", "A dog"]])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("file;caption\na.wav;A dog\n", "line 1: this table is separated by ';'; add --delimiter ';'"),
        ("file\tcaption\na.wav\tA dog\n", "add --delimiter tab"),
        ("file|caption\na.wav|A dog\n", "add --delimiter '|'"),
        ("file,caption\na.wav;A dog\nb.wav;A cat\n", "separated by ';', but the header by ','"),
        ("file,caption\na.wav,A dog, loud\nb.wav,A cat\nc.wav,A, b\n", "Captions with a ','"),
        ("file,caption,caption\na.wav,A dog,B\n", "there is more than one column caption"),
        ("file,caption,,\na.wav,A dog, loud,\nb.wav,A dog, big,\n", "in a column without a name"),
        ("a.wav,A dog\nb.wav,A cat\n", "is a row already; the first line must name the columns"),
        ('file,"caption\na.wav,A dog\n', "a quotation mark opens a field and is not closed before line 2"),
        ('file,caption\na.wav,"A dog\nb.wav,A cat\n', "line 2: a quotation mark opens a field and is not"),
        ('file,caption\na.wav,"A dog\nb.wav,A 12"\n', "before line 3, which is a row of its own (b.wav,A 12"),
        ('caption,file\n"A dog,a.wav\nA cat,b.wav\n', "before line 3, which is a row of its own (A cat,b."),
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("file,caption\n", "no row could be packed: there is none below the header"),
        ("file,caption\na.wav,A dog\n".encode("utf-16-le"), "UTF-16 without a byte order mark?"),
        ("file,caption\na.wav,A dog\nb.wav,Köln\n".encode("latin-1"), "line 3: is not UTF-8 (byte 0xf6)"),
        (b"PAR1" + bytes(100), "it is a Parquet file"),
        (b"PK\3\4\x14\0\6\0" + bytes(22) + b"[Content_Types].xml", "it is a document of Excel or Word"),
        (b"<!doctype html><title>Sign in</title>\n", "it is a web page (Sign in)"),
    ],
)  # fmt: skip
def test_a_table_of_another_kind_is_refused_with_what_to_do(
    tmp_path: Path, content: str | bytes, said: str
) -> None:
    with pytest.raises(DataError) as refused:
        read(tmp_path, content)
    assert said in str(refused.value)


def test_single_quotation_marks_around_all_captions_are_not_taken_for_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"all 2 captions stand in single quotation marks, .*\('A dog'\)"):
        read(tmp_path, "file,caption\na.wav,'A dog'\nb.wav,'A cat'\n")
    rows = [["a.wav", "'Hello', says a man"], ["b.wav", "'Cause I can'"]]
    assert rows_of(read(tmp_path, written([["file", "caption"], *rows], {}))) == rows
