"""`python -m tools.pack CSV OUT`: clips and captions -> tar shards. OUT, a folder or s3://..., is complete or
absent."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

import typer
from webdataset import ShardWriter

from configs.errors import ConfigError, DataError, run_command
from data.decode import AUDIO_ENDINGS, BadSample, probe
from data.ffmpeg import ffmpeg_would_win, needs_ffmpeg
from data.kinds import what_it_is
from data.texts import bare, sound_caption
from tools.output import Output, new_folder
from tools.spelling import find, hint, identity, native
from tools.table import CAPTION, FILE, Rejection, Row, Table, read_table

REJECTED = "rejected.csv"
SHOWN = 10
"""Values of a column that are named."""


def pack(
    path: Annotated[
        Path,
        typer.Argument(
            help="CSV with the columns file (relative to the CSV) and caption; others go into the JSON, too."
            " Several rows of a file are several captions of it.",
            metavar="CSV",
        ),
    ],
    out: Annotated[
        str,
        typer.Argument(help="Folder or s3://BUCKET/PREFIX to make, with shard-000000.tar ...", metavar="OUT"),
    ],
    caption_key: Annotated[str, typer.Option(help="The JSON field that holds the caption.")] = "caption",
    shard_mb: Annotated[int, typer.Option(min=1, help="Megabytes per shard.")] = 256,
    where: Annotated[
        str | None, typer.Option(help="Take only rows with COLUMN=VALUE, e.g. split=train.")
    ] = None,
    delimiter: Annotated[str, typer.Option(help="What separates the fields of CSV, e.g. ';' or tab.")] = ",",
) -> None:
    """Pack clips and their captions into shards for training."""
    if where is not None and "=" not in where:
        raise ConfigError(f"--where {where}: is written COLUMN=VALUE, e.g. --where split=train")
    character = _character(delimiter)
    with new_folder(out) as output:
        packed = _write(path, _wanted(path, character, where), output, caption_key, shard_mb << 20)
    shards = "1 shard" if packed.shards == 1 else f"{packed.shards} shards"
    see = f" (see {out}/{REJECTED})" if packed.rejected else ""
    print(f"{out}: {packed.samples} samples in {shards}, {packed.rejected} rows rejected{see}")
    if packed.for_ffmpeg:
        print(f"{packed.for_ffmpeg:,} of the rejected rows {ffmpeg_would_win(packed.for_ffmpeg)}")
    if packed.several:
        clips = "1 clip has" if packed.several == 1 else f"{packed.several} clips have"
        print(
            f"{clips} several captions (up to {packed.most}): training takes the first of them, unless the"
            " source says `captions: all` or `captions: random`"
        )


def _character(delimiter: str) -> str:
    """The character that --delimiter names. Raises ConfigError."""
    character = "\t" if delimiter in ("tab", "\\t") else delimiter
    if len(character) != 1 or character in '" \r\n':
        raise ConfigError(f"--delimiter {delimiter}: is one character, e.g. ';', or the word tab")
    return character


def _wanted(path: Path, delimiter: str, where: str | None) -> Table:
    """The table with the rows that are asked for."""
    column, _, value = (where or "").partition("=")
    table = read_table(path, [FILE, CAPTION, *([column] if where else [])], delimiter)
    if not where or not table.rows:
        return table
    values = [row.values[table.columns.index(column)].strip() for row in table.rows]
    rows = [row for row, its in zip(table.rows, values, strict=True) if its == value.strip()]
    if not rows:
        some = sorted(set(values))
        names = ", ".join(some[:SHOWN]) + ", ..." * (len(some) > SHOWN)
        raise DataError(f"{path}: no row could be packed: none has {where}; there is {column}={names}")
    return replace(table, rows=rows)


class _Packed(NamedTuple):
    """How many rows became samples, how many were rejected (of these only FFmpeg could read some), and in how
    many shards the samples are. Of the samples: how many have several captions, and up to how many."""

    samples: int
    rejected: int
    for_ffmpeg: int
    shards: int
    several: int
    most: int


class _Rejected(Exception):
    """A row or a clip cannot be a sample; the message is the reason."""


def _write(path: Path, table: Table, output: Output, caption_key: str, shard_bytes: int) -> _Packed:
    """Write shards, and a table of the rows that were rejected."""
    rejected: list[Rejection] = []

    def reject(rejections: Iterable[Rejection]) -> None:
        for line, file, reason in rejections:
            print(f"{path}, line {line}: {file or '(no file)'}: {reason}")
            rejected.append(Rejection(line, file, reason))

    reject(table.rejected)
    clips = _Clips(path, table.columns, caption_key)
    reasons = [clips.what_is_missing(row) for row in table.rows]
    reject(clips.rejection(row, reason) for row, reason in zip(table.rows, reasons, strict=True) if reason)
    sound = [row for row, reason in zip(table.rows, reasons, strict=True) if not reason]
    pattern = str(output.folder).replace("%", "%%") + "/shard-%06d.tar"
    with ShardWriter(
        pattern, maxcount=10**9, maxsize=shard_bytes, verbose=0, mtime=0, user="", group=""
    ) as writer:
        for file, rows in clips.by_file(sound):
            try:
                sample = clips.sample(file, rows)
            except _Rejected as reason:
                reject(clips.rejection(row, str(reason)) for row in rows)
                continue
            shard = writer.fname
            writer.write(sample)
            if writer.fname != shard:  # that one is full
                output.complete(Path(shard))
        shards = writer.shard
    for_ffmpeg = sum(needs_ffmpeg(row.reason) for row in rejected)
    if not clips.files:
        won = f"; {for_ffmpeg:,} {ffmpeg_would_win(for_ffmpeg)}" if for_ffmpeg else ""
        raise DataError(f"{path}: no row could be packed: {len(rejected)} were rejected{won}")
    if rejected:
        with (output.folder / REJECTED).open("w", newline="", encoding="utf-8") as written:
            csv.writer(written).writerows([Rejection._fields, *sorted(rejected)])
    return _Packed(len(clips.files), len(rejected), for_ffmpeg, shards, clips.several, clips.most)


class _Clips:
    """Makes samples of the rows of a table."""

    def __init__(self, table: Path, columns: Sequence[str], caption_key: str) -> None:
        if caption_key in {*columns} - {FILE, CAPTION}:
            raise ConfigError(
                f"--caption-key {caption_key}: {table} has a column of that name; choose another"
            )
        self._root, self._columns, self._caption_key = table.parent, columns, caption_key
        self._file, self._caption = columns.index(FILE), columns.index(CAPTION)
        self.files: dict[str, str] = {}
        """Of all samples so far, by key."""
        self.several, self.most = 0, 1
        """Samples so far that have several captions, and up to how many."""

    def rejection(self, row: Row, reason: str) -> Rejection:
        """A row that is not packed."""
        return Rejection(row.line, row.values[self._file], reason)

    def what_is_missing(self, row: Row) -> str:
        """Why a row says nothing of a clip; "" if it does."""
        if not bare(row.values[self._file]):
            return "no file is named"
        try:
            sound_caption(row.values[self._caption])
        except BadSample as error:
            return str(error)
        return ""

    def by_file(self, rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
        """Each clip, in the order of the first rows: its file in the spelling that is there, and its rows."""
        groups: dict[str, list[Row]] = {}
        for row in rows:
            groups.setdefault(identity(self._root, row.values[self._file]), []).append(row)
        for group in groups.values():
            spellings = {row.values[self._file]: "" for row in group}
            for written in spellings:
                spellings[written] = find(self._root, written) or written
            if len(spellings) == 1:  # as nearly always
                yield spellings.popitem()[1], group
                continue
            clips: dict[str, tuple[str, list[Row]]] = {}
            for row in group:
                spelling = spellings[row.values[self._file]]
                path = os.path.realpath(native(self._root, spelling))
                clips.setdefault(path, (spelling, []))[1].append(row)
            yield from clips.values()

    def sample(self, file: str, rows: Sequence[Row]) -> dict[str, Any]:
        """A clip as a WebDataset sample, which counts from then on. Raises _Rejected."""
        stem, _, ending = file.rpartition(".")
        if ending.lower() not in AUDIO_ENDINGS:
            known = ", ".join(sorted(AUDIO_ENDINGS))
            there = hint(self._root, file) if find(self._root, file) is None else ""
            ending = PurePosixPath(file).suffix[1:]
            what = f"{ending!r} is not" if ending else "it has no ending of"
            raise _Rejected(f"{what} an audio format that can be read ({known}){there}")
        key = re.sub(r"[./\\]", "_", stem.removeprefix("./"))
        if not key:
            raise _Rejected("there is no name before the ending")
        if key in self.files:
            raise _Rejected(f"its key {key!r} is that of {self.files[key]}")
        audio = self._read(file, ending.lower())
        self.files[key] = file
        fields = self._fields(rows)
        captions = fields[self._caption_key]
        if isinstance(captions, list):
            self.several, self.most = self.several + 1, max(self.most, len(captions))
        return {"__key__": key, ending.lower(): audio, "json": fields}

    def _read(self, file: str, ending: str) -> bytes:
        """The audio. Raises _Rejected."""
        try:
            audio = native(self._root, file).read_bytes()
            probe(audio, ending)
        except FileNotFoundError as error:
            raise _Rejected(f"cannot be read: {error.strerror}{hint(self._root, file)}") from None
        except OSError as error:
            raise _Rejected(f"cannot be read: {error.strerror}") from None
        except BadSample as error:
            name = PurePosixPath(file).name
            if name.startswith("._") and "AppleDouble" in (what := what_it_is(audio)):
                raise _Rejected(f"it is {what}, which is {name.removeprefix('._')}") from None
            raise _Rejected(str(error)) from None
        return audio

    def _fields(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The JSON of a clip: what differs between its rows is a list."""
        fields: dict[str, Any] = {}
        different = list(dict.fromkeys(row.values for row in rows))
        for place, name in enumerate(self._columns):
            values = [row[place] for row in different]
            if place not in (self._file, self._caption):
                fields[name] = values if len(set(values)) > 1 else values[0]
        captions = list(dict.fromkeys(bare(row.values[self._caption]) for row in rows))
        return {**fields, self._caption_key: captions if len(captions) > 1 else captions[0]}


if __name__ == "__main__":
    run_command(lambda: typer.run(pack))
