"""`python -m tools.pack CSV OUT`: clips and captions -> tar shards. OUT, a folder or s3://..., is complete or
absent."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from webdataset import ShardWriter

from configs.errors import ConfigError, DataError, run_command
from data.decode import AUDIO_ENDINGS, BadSample, ffmpeg_would_win, needs_ffmpeg, probe
from tools.output import Output, new_folder

REJECTED = "rejected.csv"


def pack(
    table: Annotated[
        Path,
        typer.Argument(
            help="CSV with the columns file (relative to the CSV) and caption; others go into the JSON, too.",
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
) -> None:
    """Pack clips and their captions into shards for training."""
    if where is not None and "=" not in where:
        raise ConfigError(f"--where {where}: is written COLUMN=VALUE, e.g. --where split=train")
    if "." in caption_key:
        raise ConfigError(f"--caption-key {caption_key}: names one field of the JSON, without dots")
    with new_folder(out) as output:
        packed = _write(table, output, caption_key, shard_mb << 20, where)
    shards = "1 shard" if packed.shards == 1 else f"{packed.shards} shards"
    hint = f" (see {out}/{REJECTED})" if packed.rejected else ""
    print(f"{out}: {packed.samples} samples in {shards}, {packed.rejected} rows rejected{hint}")
    if packed.for_ffmpeg:
        print(f"{packed.for_ffmpeg:,} of the rejected rows {ffmpeg_would_win(packed.for_ffmpeg)}")


class _Packed(NamedTuple):
    """How many rows became samples, how many were rejected (of these only FFmpeg could read some), and in how
    many shards the samples are."""

    samples: int
    rejected: int
    for_ffmpeg: int
    shards: int


class _Rejected(Exception):
    """A row cannot be a sample; the message is the reason."""


def _write(table: Path, output: Output, caption_key: str, shard_bytes: int, where: str | None) -> _Packed:
    """Write shards, and a table of the rows that were rejected."""
    files: dict[str, str] = {}
    rejected: list[tuple[int, str, str]] = []
    pattern = str(output.folder).replace("%", "%%") + "/shard-%06d.tar"
    with ShardWriter(
        pattern, maxcount=10**9, maxsize=shard_bytes, verbose=0, mtime=0, user="", group=""
    ) as writer:
        for line, row in _rows(table, where):
            try:
                sample = _sample(row, table.parent, caption_key, files)
            except _Rejected as reason:
                print(f"{table}, line {line}: {row.get('file') or '(no file)'}: {reason}")
                rejected.append((line, row.get("file", ""), str(reason)))
                continue
            shard = writer.fname
            writer.write(sample)
            if writer.fname != shard:  # that one is full
                output.complete(Path(shard))
        shards = writer.shard
    for_ffmpeg = sum(needs_ffmpeg(reason) for *_, reason in rejected)
    if not files:
        rows = f"with {where}" if where else "that it has"
        won = f"; {for_ffmpeg:,} {ffmpeg_would_win(for_ffmpeg)}" if for_ffmpeg else ""
        raise DataError(
            f"{table}: no row could be packed: {len(rejected)} were rejected, of those {rows}{won}"
        )
    if rejected:
        with (output.folder / REJECTED).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("line", "file", "reason"), *rejected])
    return _Packed(len(files), len(rejected), for_ffmpeg, shards)


def _rows(table: Path, where: str | None) -> Iterator[tuple[int, dict[str, str]]]:
    """The wanted rows of the CSV, each with the number of its line."""
    column, _, value = (where or "").partition("=")
    needed = ["file", "caption"]
    if where:
        needed.append(column)
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            missing = [name for name in needed if name not in columns]
            if missing:
                present = ", ".join(columns or ["nothing"])
                raise DataError(f"{table}: no column {', '.join(missing)}; it has {present}")
            for row in reader:
                if not where or row[column] == value:
                    yield reader.line_num, row
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table}: cannot read it as UTF-8 CSV: {error}") from None


def _sample(row: dict[str, Any], root: Path, caption_key: str, files: dict[str, str]) -> dict[str, Any]:
    """A row as a WebDataset sample. `files` holds the file of each key so far; this one is added.

    Raises _Rejected.
    """
    file, caption = (row.get("file") or "").strip(), (row.get("caption") or "").strip()
    if not file:
        raise _Rejected("no file is named")
    if not caption:
        raise _Rejected("the caption is empty")
    stem, _, ending = file.rpartition(".")
    if ending.lower() not in AUDIO_ENDINGS:
        known = ", ".join(sorted(AUDIO_ENDINGS))
        raise _Rejected(f"{ending!r} is not an audio format that can be read ({known})")
    key = re.sub(r"[./\\]", "_", stem.removeprefix("./"))
    if not key:
        raise _Rejected("there is no name before the ending")
    if key in files:
        raise _Rejected(f"its key {key!r} is that of {files[key]}")
    try:
        audio = (root / os.fsdecode(file.encode())).read_bytes()  # in UTF-8, whatever the locale
        probe(audio, ending.lower())
    except OSError as error:
        raise _Rejected(f"cannot be read: {error.strerror}") from None
    except BadSample as error:
        raise _Rejected(str(error)) from None
    files[key] = file
    others = {name: value for name, value in row.items() if name not in ("file", "caption", None)}
    return {"__key__": key, ending.lower(): audio, "json": {**others, caption_key: caption}}


if __name__ == "__main__":
    run_command(lambda: typer.run(pack))
