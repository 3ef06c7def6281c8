"""Where every sample lies: a Parquet sidecar per shard, merged into one memory-mapped Arrow file per run.

A quick index walks the headers of a shard: key, offset and size of the audio and the caption member. A full
one reads every byte once and adds CRC32, seconds, characters of the caption, and what is wrong with a sample.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.core import split_protocol

from configs.errors import DataError, EarwitnessError
from configs.run.files import replacing
from configs.schema import Source
from data import storage
from data.captions import find_captions
from data.decode import BadSample, probe
from data.kinds import BEGINNING, what_it_is
from data.location import Location
from data.members import Group, Part, problem_of, sort_out
from data.sources import Shard
from data.tar import Damage, Member, walk
from data.upload import write

VERSION, LAYOUT = 3, 4
"""Versions of sidecars and of merged indexes: with another one they are made anew."""
BESIDE = "beside"
"""As `data.index_dir`: sidecars are kept beside the shards, in a folder `index`."""
TRAINING, VALIDATION = "index-training.arrow", "index-validation.arrow"
QUICK_BLOCK, FULL_BLOCK = 64 << 10, 8 << 20
"""Bytes per read when only headers are wanted, and when all are."""
NOTHING = Part("", Member("", 0, 0))
"""In the place of a member that is not there."""
NEAR = 1 << 20
"""Bytes between two headers that are read along: a request costs as much time."""

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("ending", pa.string()),
        ("audio_offset", pa.int64()),
        ("audio_size", pa.int64()),
        ("text_offset", pa.int64()),
        ("text_size", pa.int64()),
        ("crc32", pa.int64()),  # of the audio, then the text; -1 in a quick index
        ("seconds", pa.float32()),  # NaN in a quick index
        ("caption_characters", pa.int32()),  # of the first caption; -1 in a quick index
        ("captions", pa.int32()),  # how many there are; -1 in a quick index, unless all are wanted
        ("members", pa.int32()),  # of the archive
        ("problem", pa.string()),  # "" for a sound sample
    ]
)


@dataclass(frozen=True)
class Sidecar:
    """The index of one shard, and what was true of the shard when it was made."""

    table: pa.Table
    full: bool
    damage: str
    """Why the shard could not be read to its end, or ""."""
    shard: storage.Stat
    """Size and tag of the shard."""
    origin: str
    """What changes when the shard is replaced or the sidecar is written anew, as `origin` gives it."""
    members: int
    """Members of the archive: those of samples, of problems, and `ignored` ones."""
    ignored: Mapping[str, int]
    """Members that are neither audio nor captions, by what they are."""

    def loss(self) -> str:
        """What is kept and what is lost of a damaged shard, in words."""
        return (
            f"DAMAGED: {self.damage}; {len(self.table)} samples before that are kept, what came after is lost"
        )


def sidecar_location(shard: Shard, index_dir: str | Path) -> Location:
    """Where the index of a shard is kept, by URL and by what was taken from the samples. index_dir: as in a
    config's `data`."""
    source, url = shard.source, shard.location.url
    folder = str(index_dir).rstrip("/")
    if folder == BESIDE:
        folder = f"{url.rpartition('/')[0]}/index"
    identity = json.dumps([VERSION, url, source.caption_key, source.audio])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    # The shard's options (keys, endpoint) are good for its own kind of storage.
    same_storage = split_protocol(folder)[0] == split_protocol(url)[0]
    return Location(
        f"{folder}/{Path(shard.location.name).stem}-{digest}.parquet",
        shard.location.options if same_storage else "{}",
    )


def load_sidecar(shard: Shard, index_dir: str | Path) -> Sidecar | None:
    """The index of a shard, or None if there is none for the shard as it is now (size and ETag or
    modification time), or none that tells what is needed (how many captions, where all are wanted)."""
    place = sidecar_location(shard, index_dir)
    kept = storage.find(place)
    if kept is None:
        return None
    now = storage.stat(shard.location)
    try:
        with pq.ParquetFile(pa.BufferReader(storage.read(place, 0, kept.size))) as file:
            indexed = json.loads(file.schema_arrow.metadata[b"earwitness"])
            if (indexed["size"], indexed["tag"]) != (now.size, now.tag):
                return None
            if shard.source.captions == "all" and not indexed["counted"]:
                return None
            return Sidecar(
                table=file.read(use_threads=False),
                full=indexed["full"],
                damage=indexed["damage"],
                shard=now,
                origin=origin(now, kept),
                members=indexed["members"],
                ignored=indexed["ignored"],
            )
    except (pa.ArrowInvalid, KeyError, TypeError):  # cut off by a full disk, or a machine that lost power
        print(f"{place.url}: this index is damaged; it is made anew", flush=True)
        return None


def origin(shard: storage.Stat, sidecar: storage.Stat) -> str:
    """What changes when a shard is replaced, or its sidecar is written anew."""
    return f"{shard.size} {shard.tag} {sidecar.size} {sidecar.tag}"


def index_shard(shard: Shard, index_dir: str | Path, *, full: bool) -> Sidecar:
    """Index a shard and keep the result in `index_dir`. Raises DataError if the shard cannot be read at
    all."""
    now = storage.stat(shard.location)
    if not now.size:
        raise DataError(
            f"{shard.location.url}: is empty, or a folder: its shards are named by a pattern, as"
            f" {shard.location.url.rstrip('/')}/*.tar"
        )
    read = _Blocks(replace(shard.location, tag=now.tag), now.size, FULL_BLOCK if full else QUICK_BLOCK)
    members, damage = [], ""
    try:
        for member in walk(read, now.size):
            members.append(member)
    except Damage as error:
        damage = str(error)
    if damage and not members:
        known = what_it_is(read(0, min(now.size, BEGINNING)))
        why = f"it is {known}" if known else damage
        folder, _, name = shard.location.url.rpartition("/")
        if not name.endswith(".tar"):
            why += f" (a pattern as {folder}/*.tar names shards alone)"
        raise DataError(f"{shard.location.url}: not a tar archive that can be read: {why}")
    if not members:
        damage = "nothing but zero bytes: an empty archive, or a download that was broken off"
    contents = sort_out(members, shard.source)
    rows = [_row(group, shard.source) for group in [*contents.samples, *contents.incomplete]]
    rows.sort(key=lambda row: min(row["audio_offset"], row["text_offset"]))
    if full or shard.source.captions == "all":
        for row in rows:
            _inspect(row, read, shard, full=full)
    return save_sidecar(
        shard,
        index_dir,
        pa.Table.from_pylist(rows, SCHEMA),
        now,
        full=full,
        damage=damage,
        members=len(members),
        ignored=contents.ignored,
    )


def save_sidecar(
    shard: Shard,
    index_dir: str | Path,
    table: pa.Table,
    stat: storage.Stat,
    *,
    full: bool,
    damage: str,
    members: int,
    ignored: Mapping[str, int],
) -> Sidecar:
    """Keep the index of a shard in `index_dir`. stat: of the shard that was indexed; the others as in
    Sidecar."""
    indexed = {
        "url": shard.location.url,
        "size": stat.size,
        "tag": stat.tag,
        "full": full,
        "damage": damage,
        "counted": full or shard.source.captions == "all",
        "members": members,
        "ignored": ignored,
    }
    place, content = sidecar_location(shard, index_dir), pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"earwitness": json.dumps(indexed)}), content)
    write(content.getvalue().to_pybytes(), place)
    return Sidecar(table, full, damage, stat, origin(stat, storage.stat(place)), members, ignored)


class _Blocks:
    """Bytes of a shard by position, read block by block; one block is held. Blocks grow as long as what is
    wanted is near."""

    def __init__(self, location: Location, size: int, block: int) -> None:
        self.location, self.size, self.least, self.block = location, size, block, block
        self.start, self.held = 0, b""

    def __call__(self, start: int, end: int) -> bytes:
        if not (self.start <= start and end <= self.start + len(self.held)):
            near = bool(self.held) and 0 <= start - self.start - len(self.held) <= NEAR
            self.block = min(2 * self.block, FULL_BLOCK) if near else self.least
            self.held = storage.read(self.location, start, min(max(end, start + self.block), self.size))
            self.start = start
        return self.held[start - self.start : end - self.start]


def _row(group: Group, source: Source) -> dict[str, Any]:
    """A sample, or members that make none."""
    problem = problem_of(group, source)
    audio, text = (parts[0] if parts else NOTHING for parts in (group.audio, group.text))
    return {
        "key": group.key,
        "ending": audio.ending,
        "audio_offset": audio.member.offset,
        "audio_size": audio.member.size,
        "text_offset": text.member.offset,
        "text_size": text.member.size,
        "crc32": -1,
        "seconds": float("nan"),
        "caption_characters": -1,
        "captions": -1,
        "members": 2 if group.is_pair else group.members,
        "problem": problem,
    }


def _inspect(row: dict[str, Any], read: _Blocks, shard: Shard, *, full: bool) -> None:
    """Complete a row from the bytes of its sample, for a quick index from those of its captions alone."""
    if row["problem"]:
        return
    content = {}
    # Forwards, as one block is held.
    for name in sorted(("audio", "text") if full else ("text",), key=lambda name: row[f"{name}_offset"]):
        start = row[f"{name}_offset"]
        content[name] = read(start, start + row[f"{name}_size"])
    if full:
        row["crc32"] = zlib.crc32(content["text"], zlib.crc32(content["audio"]))
    try:
        captions = find_captions(content["text"], shard.source.caption_keys)
        row["captions"], row["caption_characters"] = len(captions), len(captions[0])
        if full:
            row["seconds"] = probe(content["audio"], row["ending"]).seconds
    except BadSample as error:
        row["problem"] = str(error)


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
