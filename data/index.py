"""Where every sample of a shard lies: a Parquet sidecar.

A quick index walks the headers of a shard: key, offset and size of the audio and the caption member. A full
one reads every byte once and adds CRC32, seconds, characters of the caption, and what is wrong with a sample.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import split_protocol

from configs.errors import DataError
from configs.schema import Source
from data import storage
from data.captions import find_captions
from data.decode import BadSample, probe
from data.kinds import BEGINNING, TAR_ARCHIVE, what_it_is
from data.location import Location
from data.members import Group, Part, problem_of, sort_out
from data.sources import Shard
from data.tar import Damage, Member, walk
from data.upload import write

VERSION = 3
"""Version of sidecars: those of another one are made anew."""
BESIDE = "beside"
"""As `data.index_dir`: sidecars are kept beside the shards, in a folder `index`."""
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


def ignored_in_words(kinds: Mapping[str, int]) -> str:
    """As `4 ignored (folder x 3, hidden files x 1)`. kinds: how many there are of each."""
    named = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    parts = f" ({', '.join(f'{kind} x {count:,}' for kind, count in named)})" if named else ""
    return f"{sum(kinds.values()):,} ignored{parts}"


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
        why = f"it is {known}" if known not in ("", TAR_ARCHIVE) else damage
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
