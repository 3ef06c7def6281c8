"""The samples of a run: the indexes of its shards, merged into one memory-mapped Arrow file for training, and
one for validation."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import DataError, EarwitnessError
from configs.run.files import replacing
from configs.schema import Source
from data.index import Sidecar
from data.location import Location
from data.sources import Shard

LAYOUT = 4
"""Version of merged indexes: those of another one are made anew."""
TRAINING, VALIDATION = "index-training.arrow", "index-validation.arrow"


class Index:
    """The samples of a run, memory-mapped. Rows are sorted by source, shard and position in the shard.

    `source`, `shard`: numbers into the config's sources and `shards`; offsets and sizes in bytes; `crc32` -1
    and `seconds` NaN where the shard's index is a quick one; `caption`: number of the caption with
    `captions: all`, else -1.
    """

    def __init__(self, path: Path, sources: Sequence[Source]) -> None:
        """Map what `merge` wrote; nothing is listed or opened in the storage of the shards."""
        with pa.memory_map(str(path)) as file:
            self.table = pa.ipc.open_file(file).read_all()
        self.digest: str = self.table.schema.metadata[b"digest"].decode()
        named = {
            source.name: (source, json.dumps(source.storage_options, sort_keys=True)) for source in sources
        }
        self._sources = len(sources)
        self.shards = []
        for name, url, tag, size in json.loads(self.table.schema.metadata[b"shards"]):
            source, options = named[name]
            self.shards.append(Shard(source, Location(url, options, tag, size)))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column of numbers, without a copy."""
        column = self.table.column(name)
        return column.chunk(0).to_numpy() if column.num_chunks == 1 else column.to_numpy()

    def samples_by_source(self) -> list[int]:
        """Samples of each source, in the order of the config."""
        counts: list[int] = np.bincount(self.column("source"), minlength=self._sources).tolist()
        return counts

    def text(self, name: str, row: int) -> str:
        """One value of a column of strings."""
        return str(self.table.column(name)[row].as_py())

    def identity(self, row: int) -> str:
        """SOURCE/SHARD_FILE/KEY of a sample, as the audit names it; with `captions: all` the second caption
        of a clip is KEY#2, and so on."""
        shard = self.shards[int(self.column("shard")[row])]
        caption = int(self.column("caption")[row])
        number = f"#{caption + 1}" if caption > 0 else ""
        return f"{shard.source.name}/{shard.location.name}/{self.text('key', row)}{number}"


def read_metadata(path: Path) -> dict[bytes, bytes]:
    """What is kept with a merged index, nothing if there is none that can be read."""
    try:
        with pa.memory_map(str(path)) as file:
            return dict(pa.ipc.open_file(file).schema.metadata)
    except (FileNotFoundError, pa.ArrowInvalid):
        return {}


def merge(
    shards: Sequence[Shard],
    sidecars: Sequence[Sidecar],
    folder: Path,
    *,
    longest: float = float("inf"),
    notes: Mapping[str, str] | None = None,
) -> None:
    """Merge the sound samples of all shards into two Arrow files in `folder`, TRAINING and VALIDATION.

    Samples known to be longer than `longest` seconds are left out. `notes` are kept with both files. Raises
    DataError if a source has no sample for training, or none of its samples for validation is sound.
    """
    parts = [_samples(shard, sidecar) for shard, sidecar in zip(shards, sidecars, strict=True)]
    table = pa.concat_tables(parts)
    lengths, names = [len(part) for part in parts], [shard.source.name for shard in shards]
    sources = list(dict.fromkeys(names))
    numbers: dict[str, npt.NDArray[Any]] = {
        "source": np.repeat(np.array([sources.index(name) for name in names], np.int16), lengths),
        "shard": np.repeat(np.arange(len(shards), dtype=np.int32), lengths),
    }
    usable = pc.equal(table["problem"], "").to_numpy() & ~(table["seconds"].to_numpy() > longest)
    validation = np.concatenate([_held_out(shard, part) for shard, part in zip(shards, parts, strict=True)])
    table = table.drop_columns(["problem", "caption_characters", "captions", "members"])
    listed = [
        [shard.source.name, shard.location.url, sidecar.shard.tag, sidecar.shard.size]
        for shard, sidecar in zip(shards, sidecars, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for file, wanted in ((TRAINING, usable & ~validation), (VALIDATION, usable & validation)):
        # Column by column: one of the sidecars' and one of the merged index at a time is copied.
        columns = {name: table[name].filter(pa.array(wanted)).combine_chunks() for name in table.column_names}
        merged = pa.table({**columns, **{name: column[wanted] for name, column in numbers.items()}})
        counts = np.bincount(merged["source"].to_numpy(), minlength=len(sources))
        meant = np.bincount(numbers["source"][validation], minlength=len(sources))
        empty = [
            name
            for name, count, held_out in zip(sources, counts, meant, strict=True)
            if not count and (file == TRAINING or held_out)
        ]
        if empty:
            purpose = "train on" if file == TRAINING else "validate with"
            raise DataError(
                f"no sample to {purpose} in source {', '.join(empty)}: see its shards with `python -m"
                " tools.index`, which names every problem"
            )
        metadata = {**(notes or {}), "digest": _digest(merged, shards), "shards": json.dumps(listed)}
        _write(merged.replace_schema_metadata(metadata), folder / file)


def training_samples(shard: Shard, sidecar: Sidecar, longest: float) -> int:
    """How many samples of a shard `merge` takes for training."""
    samples = _samples(shard, sidecar)
    usable = pc.equal(samples["problem"], "").to_numpy() & ~(samples["seconds"].to_numpy() > longest)
    return int((usable & ~_held_out(shard, samples)).sum())


def _write(merged: pa.Table, path: Path) -> None:
    """Write an Arrow file whose columns are in one piece each; it is on disk before it takes the place of
    another one."""
    try:
        with replacing(path) as file:
            with pa.ipc.new_file(file, merged.schema) as writer:
                writer.write_table(merged, max_chunksize=max(1, len(merged)))
            os.fsync(file.fileno())
    except OSError as error:
        raise EarwitnessError(
            f"{path}: cannot be written: {error.strerror}. Make room there, or give the run another folder"
            " (run.dir)."
        ) from error


def _samples(shard: Shard, sidecar: Sidecar) -> pa.Table:
    """The rows of a shard, each with the number of the caption that it stands for.

    With `captions: all`, a clip is a sample for each of its captions: after the first ones of all clips come
    the second ones, so that they come at other times of an epoch. Else the number is -1.
    """
    table = sidecar.table.replace_schema_metadata(None)
    number = np.full(len(table), -1, np.int16)
    if shard.source.captions == "all":
        counts = np.maximum(table["captions"].to_numpy(), 1)  # those that cannot be used have none
        passes = [np.flatnonzero(counts > caption) for caption in range(counts.max(initial=0))]
        number = np.repeat(np.arange(len(passes), dtype=np.int16), [len(rows) for rows in passes])
        table = table.take(np.concatenate([np.zeros(0, np.int64), *passes]))
    return table.append_column("caption", pa.array(number))


def _held_out(shard: Shard, samples: pa.Table) -> npt.NDArray[np.bool_]:
    """(samples,) which of a shard's samples are for validation."""
    if shard.validation or not shard.source.validation.fraction:
        return np.full(len(samples), shard.validation)
    return held_out(samples["key"].to_pylist(), shard.source)


def held_out(keys: Sequence[str], source: Source) -> npt.NDArray[np.bool_]:
    """(keys,) which samples belong to the validation part: by SHA-256 of the key alone (or of the part that
    `group` matches)."""
    if source.validation.group:
        pattern = re.compile(source.validation.group)
        keys = [_group_of(key, pattern) for key in keys]
    hashes = b"".join(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8] for key in keys)
    return np.frombuffer(hashes, ">u8") < np.uint64(math.ceil(source.validation.fraction * 2**64))


def _group_of(key: str, pattern: re.Pattern[str]) -> str:
    """The part of a key that a pattern matches, or its first group; the key where that is nothing."""
    match = pattern.search(key)
    if match is None:
        return key
    return match[1 if pattern.groups else 0] or key


def is_held_out(key: str, source: Source) -> bool:
    """Whether one sample belongs to the validation part."""
    return bool(held_out([key], source)[0])


def _digest(merged: pa.Table, shards: Sequence[Shard]) -> str:
    """SHA-256 of (source, shard file name, key, size) of all samples: what must not change under a run.

    URLs and ETags may. So may the CRC, which a quick index does not know: a run may go on when a full index
    was made meanwhile; each sample is checked against its CRC when it is read.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([[shard.source.name, shard.location.name] for shard in shards]).encode())
    for name in ("shard", "audio_size", "text_size"):
        digest.update(merged[name].to_numpy().tobytes())
    for number, keys in enumerate(merged["key"].chunks):
        whole = pa.ListArray.from_arrays(pa.array([0, len(keys)], pa.int32()), keys)
        if number > 0:
            digest.update(b"\n")
        digest.update(pc.binary_join(whole, "\n")[0].as_buffer())
    return digest.hexdigest()
