"""Small shards, and what an index says of them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import soundfile

from configs.schema import Source
from data.index import index_shard
from data.merged import TRAINING, VALIDATION, Index, merge
from data.sources import expand
from tests.making import sound_of

Members = list[tuple[str, bytes]]


def sound(number: int = 0, ending: str = "wav") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound_of(number), 16_000, format=ending)
    return file.getvalue()


def words(caption: str = "A bell.", **others: object) -> bytes:
    return json.dumps({"caption": caption, **others}).encode()


def clip(key: str, number: int = 0) -> Members:
    return [(f"{key}.wav", sound(number)), (f"{key}.json", words(f"Clip {number}."))]


def shard(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", encoding="utf-8") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def source(*shards: Path | str, name: str = "sounds", **options: object) -> Source:
    return Source(name=name, shards=[str(path) for path in shards], **options)


def rows(path: Path, *, full: bool = True, **options: object) -> dict[str, dict]:
    """The rows of a shard's sidecar by key."""
    (indexed,) = expand(source(path, **options))
    sidecar = index_shard(indexed, path.parent / "index", full=full)
    return {row["key"]: row for row in sidecar.table.to_pylist()}


def merged(folder: Path, *sources: Source, full: bool = True, held_out: bool = False) -> Index:
    shards = [shard for source in sources for shard in expand(source)]
    merge(shards, [index_shard(shard, folder, full=full) for shard in shards], folder)
    return Index(folder / (VALIDATION if held_out else TRAINING), sources)


def keys(index: Index) -> set[str]:
    return {index.text("key", row) for row in range(len(index))}
