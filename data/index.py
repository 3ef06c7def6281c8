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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

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
from data.captions import find_caption
from data.decode import AUDIO_ENDINGS, BadSample, probe
from data.location import Location
from data.sources import Shard
from data.tar import Damage, Member, walk
from data.upload import write

VERSION, LAYOUT = 2, 4
"""Versions of sidecars and of merged indexes: with another one they are made anew."""
BESIDE = "beside"
"""As `data.index_dir`: sidecars are kept beside the shards, in a folder `index`."""
TRAINING, VALIDATION = "index-training.arrow", "index-validation.arrow"
QUICK_BLOCK, FULL_BLOCK = 64 << 10, 8 << 20
"""Bytes per read when only headers are wanted, and when all are."""
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
        ("caption_characters", pa.int32()),  # -1 in a quick index
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
    modification time)."""
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
            return Sidecar(
                table=file.read(use_threads=False),
                full=indexed["full"],
                damage=indexed["damage"],
                shard=now,
                origin=origin(now, kept),
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
        raise DataError(f"{shard.location.url}: not a tar archive that can be read: {damage}")
    rows = [_row(key, parts, shard.source) for key, parts in _group(members).items()]
    rows.sort(key=lambda row: min(row["audio_offset"], row["text_offset"]))
    if full:
        for row in rows:
            _inspect(row, read, shard)
    return save_sidecar(shard, index_dir, pa.Table.from_pylist(rows, SCHEMA), now, full=full, damage=damage)


def save_sidecar(
    shard: Shard, index_dir: str | Path, table: pa.Table, stat: storage.Stat, *, full: bool, damage: str
) -> Sidecar:
    """Keep the index of a shard in `index_dir`; stat: of the shard that was indexed."""
    indexed = {"url": shard.location.url, "size": stat.size, "tag": stat.tag, "full": full, "damage": damage}
    place, content = sidecar_location(shard, index_dir), pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"earwitness": json.dumps(indexed)}), content)
    write(content.getvalue().to_pybytes(), place)
    return Sidecar(table, full, damage, stat, origin(stat, storage.stat(place)))


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


class _Part(NamedTuple):
    """A member of a sample, and its ending in lower case."""

    ending: str
    member: Member


def _group(members: Iterable[Member]) -> dict[str, list[_Part]]:
    """Members by sample: the key is the path up to the first dot of its last part, the rest the ending."""
    samples: dict[str, list[_Part]] = {}
    for member in members:
        # Arrow takes UTF-8 only.
        name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        folder, slash, file = name.rpartition("/")
        stem, _, ending = file.partition(".")
        if stem and ending:
            samples.setdefault(folder + slash + stem, []).append(_Part(ending.lower(), member))
    return samples


def _row(key: str, parts: list[_Part], source: Source) -> dict[str, Any]:
    text_ending = source.caption_key.lower().lstrip(".") if source.caption_key.startswith(".") else "json"
    audio = [part for part in parts if part.ending.rsplit(".", 1)[-1] in AUDIO_ENDINGS]
    if source.audio is not None:
        audio = [part for part in audio if part.ending == source.audio.lower().lstrip(".")]
    text = [part for part in parts if part.ending == text_ending]
    problem = ""
    if not audio:
        problem = f"no audio member (there are .{', .'.join(part.ending for part in parts)})"
    elif not text:
        problem = f"no .{text_ending} member"
    elif len({part.ending for part in audio}) > 1:
        raise DataError(
            f"source {source.name}: sample {key!r} has several audio members"
            f" (.{', .'.join(part.ending for part in audio)}); say which one to use:"
            f" data.sources.{source.name}.audio={audio[0].ending}"
        )
    elif len(audio) > 1 or len(text) > 1:
        problem = "the key occurs twice in this shard"
    elif not audio[0].member.size:
        problem = "the audio is empty (0 bytes)"
    nothing = _Part("", Member("", parts[0].member.offset, 0))
    ending, sound = audio[0] if audio else nothing
    _, words = text[0] if text else nothing
    return {
        "key": key,
        "ending": ending,
        "audio_offset": sound.offset,
        "audio_size": sound.size,
        "text_offset": words.offset,
        "text_size": words.size,
        "crc32": -1,
        "seconds": float("nan"),
        "caption_characters": -1,
        "problem": problem,
    }


def _inspect(row: dict[str, Any], read: _Blocks, shard: Shard) -> None:
    """Complete a row from the bytes of its sample."""
    if row["problem"]:
        return
    content = {}
    # Forwards, as one block is held.
    for name in sorted(("audio", "text"), key=lambda name: row[f"{name}_offset"]):
        start = row[f"{name}_offset"]
        content[name] = read(start, start + row[f"{name}_size"])
    audio, text = content["audio"], content["text"]
    row["crc32"] = zlib.crc32(text, zlib.crc32(audio))
    try:
        caption = find_caption(text, shard.source.caption_key)
        row["caption_characters"] = len(caption)
        row["seconds"] = probe(audio, row["ending"]).seconds
    except BadSample as error:
        row["problem"] = str(error)


class Index:
    """The samples of a run, memory-mapped. Rows are sorted by source, shard and position in the shard.

    `source`, `shard`: numbers into the config's sources and `shards`; offsets and sizes in bytes; `crc32` -1
    and `seconds` NaN where the shard's index is a quick one.
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
        """SOURCE/SHARD_FILE/KEY of a sample, as the audit names it."""
        shard = self.shards[int(self.column("shard")[row])]
        return f"{shard.source.name}/{shard.location.name}/{self.text('key', row)}"


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
    table = pa.concat_tables(sidecar.table.replace_schema_metadata(None) for sidecar in sidecars)
    lengths, names = [len(sidecar.table) for sidecar in sidecars], [shard.source.name for shard in shards]
    sources = list(dict.fromkeys(names))
    numbers: dict[str, npt.NDArray[Any]] = {
        "source": np.repeat(np.array([sources.index(name) for name in names], np.int16), lengths),
        "shard": np.repeat(np.arange(len(shards), dtype=np.int32), lengths),
    }
    usable = pc.equal(table["problem"], "").to_numpy() & ~(table["seconds"].to_numpy() > longest)
    validation = np.concatenate(
        [_held_out(shard, sidecar) for shard, sidecar in zip(shards, sidecars, strict=True)]
    )
    table = table.drop_columns(["problem", "caption_characters"])
    listed = [
        [shard.source.name, shard.location.url, sidecar.shard.tag, sidecar.shard.size]
        for shard, sidecar in zip(shards, sidecars, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for file, chosen in ((TRAINING, usable & ~validation), (VALIDATION, usable & validation)):
        # Column by column: one of the sidecars' and one of the merged index at a time is copied.
        columns = {name: table[name].filter(pa.array(chosen)).combine_chunks() for name in table.column_names}
        merged = pa.table({**columns, **{name: column[chosen] for name, column in numbers.items()}})
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


def _held_out(shard: Shard, sidecar: Sidecar) -> npt.NDArray[np.bool_]:
    """(samples,) which of a shard's samples are for validation."""
    if shard.validation or not shard.source.validation.fraction:
        return np.full(len(sidecar.table), shard.validation)
    return held_out(sidecar.table["key"].to_pylist(), shard.source)


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
