"""Where every sample lies: a Parquet sidecar per shard, merged into one memory-mapped Arrow file per run.

A quick index walks the headers of a shard: key, offset and size of the audio and the caption member. A full one reads every byte
once and adds CRC32, seconds, characters of the caption, and what is wrong with a sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import DataError
from configs.schema import Source
from data import storage
from data.captions import find_caption
from data.decode import AUDIO_ENDINGS, BadSample, probe
from data.sources import Shard
from data.tar import Damage, Member, walk

VERSION = 2
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
    tag: str
    """Of the shard, as `storage.Stat` has it."""

    def loss(self) -> str:
        """What is kept and what is lost of a damaged shard, in words."""
        return f"DAMAGED: {self.damage}; {len(self.table)} samples before that are kept, what came after is lost"


def sidecar_path(shard: Shard, index_dir: Path) -> Path:
    """Where the index of a shard is kept: by URL and by what was taken from the samples."""
    source = shard.source
    identity = json.dumps([VERSION, shard.location.url, source.caption_key, source.audio])
    return index_dir / f"{Path(shard.location.name).stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.parquet"


def load_sidecar(shard: Shard, index_dir: Path) -> Sidecar | None:
    """The index of a shard, or None if there is none for the shard as it is now (size and ETag or modification time)."""
    path = sidecar_path(shard, index_dir)
    if not path.exists():
        return None
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"earwitness"])
    now = storage.stat(shard.location)
    if (about["size"], about["tag"]) != (now.size, now.tag):
        return None
    return Sidecar(table, about["full"], about["damage"], now.tag)


def index_shard(shard: Shard, index_dir: Path, *, full: bool) -> Sidecar:
    """Index a shard and keep the result in `index_dir`. Raises DataError if the shard cannot be read at all."""
    now = storage.stat(shard.location)
    read = _Blocks(replace(shard.location, tag=now.tag), now.size, FULL_BLOCK if full else QUICK_BLOCK)
    members, damage = [], ""
    try:
        for member in walk(read, now.size):
            members.append(member)
    except Damage as error:
        damage = str(error)
    if damage and not members:
        raise DataError(f"{shard.location.url}: not a tar archive that can be read: {damage}")
    rows = [_row(key, parts, shard.source) for key, parts in _group(members)]
    rows.sort(key=lambda row: min(row["audio_offset"], row["text_offset"]))
    if full:
        for row in rows:
            _inspect(row, read, shard)
    table = pa.Table.from_pylist(rows, SCHEMA)
    about = {"url": shard.location.url, "size": now.size, "tag": now.tag, "full": full, "damage": damage}
    path = sidecar_path(shard, index_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(table.replace_schema_metadata({"earwitness": json.dumps(about)}), temporary)
    temporary.replace(path)
    return Sidecar(table, full, damage, now.tag)


class _Blocks:
    """Bytes of a shard by position, read block by block; one block is held. Blocks grow as long as what is wanted is near."""

    def __init__(self, location: storage.Location, size: int, block: int) -> None:
        self.location, self.size, self.least, self.block = location, size, block, block
        self.start, self.held = 0, b""

    def __call__(self, start: int, end: int) -> bytes:
        if not (self.start <= start and end <= self.start + len(self.held)):
            near = bool(self.held) and 0 <= start - self.start - len(self.held) <= NEAR
            self.block = min(2 * self.block, FULL_BLOCK) if near else self.least
            self.held = storage.read(self.location, start, min(max(end, start + self.block), self.size))
            self.start = start
        return self.held[start - self.start : end - self.start]


def _group(members: Iterable[Member]) -> list[tuple[str, list[tuple[str, Member]]]]:
    """Members by sample: the key is the path up to the first dot of its last part, the rest the ending, in lower case."""
    samples: dict[str, list[tuple[str, Member]]] = {}
    for member in members:
        name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # Arrow takes UTF-8 only
        folder, slash, file = name.rpartition("/")
        stem, _, ending = file.partition(".")
        if stem and ending:
            samples.setdefault(folder + slash + stem, []).append((ending.lower(), member))
    return list(samples.items())


def _row(key: str, parts: list[tuple[str, Member]], source: Source) -> dict[str, Any]:
    text_ending = source.caption_key.lower().lstrip(".") if source.caption_key.startswith(".") else "json"
    audio = [(ending, m) for ending, m in parts if ending.rsplit(".", 1)[-1] in AUDIO_ENDINGS]
    if source.audio is not None:
        audio = [(ending, m) for ending, m in audio if ending == source.audio.lower().lstrip(".")]
    text = [m for ending, m in parts if ending == text_ending]
    problem = ""
    if not audio:
        problem = f"no audio member (there are .{', .'.join(ending for ending, _ in parts)})"
    elif not text:
        problem = f"no .{text_ending} member"
    elif len({ending for ending, _ in audio}) > 1:
        raise DataError(
            f"source {source.name}: sample {key!r} has several audio members (.{', .'.join(ending for ending, _ in audio)}); "
            f"say which one to use: data.sources.{source.name}.audio={audio[0][0]}"
        )
    elif len(audio) > 1 or len(text) > 1:
        problem = "the key occurs twice in this shard"
    elif not audio[0][1].size:
        problem = "the audio is empty (0 bytes)"
    nothing = Member("", parts[0][1].offset, 0)
    ending, sound = audio[0] if audio else ("", nothing)
    words = text[0] if text else nothing
    return {
        "key": key, "ending": ending, "audio_offset": sound.offset, "audio_size": sound.size, "text_offset": words.offset, "text_size": words.size,
        "crc32": -1, "seconds": float("nan"), "caption_characters": -1, "problem": problem,
    }  # fmt: skip


def _inspect(row: dict[str, Any], read: _Blocks, shard: Shard) -> None:
    """Complete a row from the bytes of its sample."""
    if row["problem"]:
        return
    places = {name: (row[f"{name}_offset"], row[f"{name}_offset"] + row[f"{name}_size"]) for name in ("audio", "text")}
    content = {name: read(*place) for name, place in sorted(places.items(), key=lambda item: item[1])}  # forwards: one block is held
    audio = content["audio"]
    row["crc32"] = zlib.crc32(content["text"], zlib.crc32(audio))
    try:
        caption = find_caption(content["text"], shard.source.caption_key)
        row["caption_characters"] = len(caption)
        row["seconds"] = probe(audio, row["ending"]).seconds
    except BadSample as error:
        row["problem"] = str(error)


class Index:
    """The samples of a run, memory-mapped. Rows are sorted by source, shard and position in the shard.

    `source`, `shard`: numbers into the config's sources and `shards`; offsets and sizes in bytes; `crc32` -1 and `seconds` NaN where the
    shard's index is a quick one.
    """

    def __init__(self, path: Path, sources: Sequence[Source]) -> None:
        """Map what `merge` wrote; nothing is listed or opened in the storage of the shards."""
        with pa.memory_map(str(path)) as file:
            self.table = pa.ipc.open_file(file).read_all()
        self.digest: str = self.table.schema.metadata[b"digest"].decode()
        by_name = {source.name: source for source in sources}
        listed = json.loads(self.table.schema.metadata[b"shards"])
        self.shards = [Shard(by_name[name], storage.Location(url, json.dumps(by_name[name].storage_options, sort_keys=True), tag)) for name, url, tag in listed]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str) -> npt.NDArray[Any]:
        """A column of numbers, without a copy."""
        column = self.table.column(name)
        return column.chunk(0).to_numpy() if column.num_chunks == 1 else column.to_numpy()

    def text(self, name: str, row: int) -> str:
        """One value of a column of strings."""
        return str(self.table.column(name)[row].as_py())

    def identity(self, row: int) -> str:
        """SOURCE/SHARD_FILE/KEY of a sample, as the audit names it."""
        shard = self.shards[int(self.column("shard")[row])]
        return f"{shard.source.name}/{shard.location.name}/{self.text('key', row)}"


def merge(shards: Sequence[Shard], sidecars: Sequence[Sidecar], path: Path, *, validation: bool, longest: float = float("inf")) -> None:
    """Merge the sound samples of all shards (either for training or for validation) into an Arrow file at `path`.

    Samples known to be longer than `longest` seconds are left out. Raises DataError if a source has no sample for training.
    """
    tables = []
    sources = list(dict.fromkeys(shard.source.name for shard in shards))
    for number, (shard, sidecar) in enumerate(zip(shards, sidecars, strict=True)):
        table = sidecar.table
        keys = table.column("key").to_pylist()
        held_out = np.array([shard.validation or is_held_out(key, shard.source) for key in keys], bool)
        sound = np.array([problem == "" for problem in table.column("problem").to_pylist()], bool)
        fits = ~(table.column("seconds").to_numpy() > longest)
        table = table.drop_columns(["problem", "caption_characters"]).filter(pa.array(sound & fits & (held_out == validation)))
        table = table.append_column("source", pa.array(np.full(len(table), sources.index(shard.source.name), np.int16)))
        tables.append(table.append_column("shard", pa.array(np.full(len(table), number, np.int32))))
    merged = pa.concat_tables(table.replace_schema_metadata(None) for table in tables).combine_chunks()
    present = set(np.unique(merged.column("source").to_numpy()).tolist())
    if not validation and (empty := [name for i, name in enumerate(sources) if i not in present]):
        raise DataError(f"no sample to train on in source {', '.join(empty)}: see its shards with `python -m tools.index`, which names every problem")
    listed = [[shard.source.name, shard.location.url, sidecar.tag] for shard, sidecar in zip(shards, sidecars, strict=True)]
    merged = merged.replace_schema_metadata({"digest": _digest(merged, shards), "shards": json.dumps(listed)})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, merged.schema) as writer:
        writer.write_table(merged, max_chunksize=max(1, len(merged)))
    temporary.replace(path)


def is_held_out(key: str, source: Source) -> bool:
    """Whether a sample belongs to the validation part: by SHA-256 of its key alone (or of the part that `group` matches)."""
    if not source.validation.fraction:
        return False
    found = re.search(source.validation.group, key) if source.validation.group else None
    hashed = (found.group(1 if found.re.groups else 0) if found else None) or key
    number = int.from_bytes(hashlib.sha256(hashed.encode("utf-8", "surrogateescape")).digest()[:8], "big")
    return number < source.validation.fraction * 2**64


def _digest(merged: pa.Table, shards: Sequence[Shard]) -> str:
    """SHA-256 of (source, shard file name, key, size) of all samples: what must not change under a run.

    URLs and ETags may. So may the CRC, which a quick index does not know: a run may go on when a full index was made meanwhile; each
    sample is checked against its CRC when it is read.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([[shard.source.name, shard.location.name] for shard in shards]).encode())
    for name in ("shard", "audio_size", "text_size"):
        digest.update(np.ascontiguousarray(merged.column(name).to_numpy()).tobytes())
    digest.update("\n".join(merged.column("key").to_pylist()).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
