"""`python -m tools.pack CSV OUT`: clips and captions -> tar shards. OUT, a folder or s3://..., is complete or
absent."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from webdataset import ShardWriter

from configs.errors import ConfigError, DataError, run_command
from data.decode import AUDIO_ENDINGS, BadSample, probe
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
        packed, rejected, shards = _write(table, output, caption_key, shard_mb << 20, where)
    print(
        f"{out}: {packed} samples in {shards} shard{'s' * (shards != 1)}, {rejected} rows rejected"
        + (f" (see {out}/{REJECTED})" if rejected else "")
    )


def _write(
    table: Path, output: Output, caption_key: str, shard_bytes: int, where: str | None
) -> tuple[int, int, int]:
    """Write shards; (rows packed, rows rejected, shards)."""
    seen: dict[str, str] = {}
    rejected = []
    pattern = str(output.folder).replace("%", "%%") + "/shard-%06d.tar"
    with ShardWriter(
        pattern, maxcount=10**9, maxsize=shard_bytes, verbose=0, mtime=0, user="", group=""
    ) as writer:
        for line, row in _rows(table, where):
            sample = _sample(row, table.parent, caption_key, seen)
            if isinstance(sample, str):
                print(f"{table}, line {line}: {row.get('file') or '(no file)'}: {sample}")
                rejected.append([line, row.get("file", ""), sample])
            else:
                shard = writer.fname
                writer.write(sample)
                if writer.fname != shard:  # that one is full
                    output.complete(Path(shard))
        shards = writer.shard
    if not seen:
        raise DataError(
            f"{table}: no row could be packed: {len(rejected)} were rejected, of those"
            f" {f'with {where}' if where else 'that it has'}"
        )
    if rejected:
        with (output.folder / REJECTED).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["line", "file", "reason"], *rejected])
    return len(seen), len(rejected), shards


def _rows(table: Path, where: str | None) -> Iterator[tuple[int, dict[str, str]]]:
    column, _, value = (where or "").partition("=")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [
                name
                for name in ("file", "caption", *([column] if where else []))
                if name not in (reader.fieldnames or [])
            ]
            if missing:
                raise DataError(
                    f"{table}: no column {', '.join(missing)}; it has"
                    f" {', '.join(reader.fieldnames or ['nothing'])}"
                )
            yield from ((reader.line_num, row) for row in reader if not where or row[column] == value)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table}: cannot read it as UTF-8 CSV: {error}") from None


def _sample(row: dict[str, Any], root: Path, caption_key: str, seen: dict[str, str]) -> dict[str, Any] | str:
    """A row as a WebDataset sample, or the reason why it cannot be one."""
    file, caption = (row.get("file") or "").strip(), (row.get("caption") or "").strip()
    if not file:
        return "no file is named"
    if not caption:
        return "the caption is empty"
    stem, _, ending = file.rpartition(".")
    if ending.lower() not in AUDIO_ENDINGS:
        return f"{ending!r} is not an audio format that can be read ({', '.join(sorted(AUDIO_ENDINGS))})"
    key = re.sub(r"[./\\]", "_", stem.removeprefix("./"))
    if not key.rpartition("/")[2]:
        return "there is no name before the ending"
    if key in seen:
        return f"its key {key!r} is that of {seen[key]}"
    try:
        audio = (root / file).read_bytes()
        probe(audio, ending.lower())
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except BadSample as error:
        return str(error)
    seen[key] = file
    about = {name: value for name, value in row.items() if name not in ("file", "caption", None)}
    return {"__key__": key, ending.lower(): audio, "json": {**about, caption_key: caption}}


if __name__ == "__main__":
    run_command(lambda: typer.run(pack))
