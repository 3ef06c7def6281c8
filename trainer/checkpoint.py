"""Checkpoints without world size, engine or pickle: fragments of named parameters in safetensors files, and a
manifest.

    checkpoints/step-00001000/
        rank-00000-of-00002.safetensors   `NAME:KIND`: 1-D float32 fragments of this rank
        manifest.json                     where every [start, end) of every parameter lies, digests, step

A folder without a valid manifest does not exist. Writing (trainer/writer.py) goes to `step-N.aATTEMPT.tmp`,
which is renamed when all is on disk. One that turns out to be damaged is set aside as `step-N.damaged`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from xxhash import xxh3_128

from configs.errors import CheckpointError, ConfigError
from configs.metrics import cost
from configs.schema import Checkpoint

FORMAT = 2
MANIFEST = "manifest.json"
DIGEST_BLOCK = 16 << 20
"""Bytes per digest (XXH3, 128 bits: it finds damage, not forgery), so that a reader can trust a slice without
reading the whole file."""
NAME = re.compile(r"step-(\d{8})")
UNFINISHED = re.compile(r"step-\d{8}\.a(\d+)\b.*")
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(kw_only=True)
class Manifest:
    """What a checkpoint is."""

    step: int
    """Optimizer steps taken; the position in the data follows from it."""
    updates: int
    """AdamW's own counter: steps less the skipped ones."""
    identity: dict[str, Any]
    """What must be the same for the run to go on exactly (trainer/changes.py)."""
    epoch_base: tuple[int, int] = (0, 0)
    """Global step at which the present order of the samples begins, and its first epoch."""
    position: tuple[int, int] = (0, 0)
    """Epoch of the next step, and its number in that epoch; for information, and for a change of the data."""
    reason: str = "interval"
    """Why it was saved: interval, best, stop, finished."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last evaluation's."""
    caption_tokens: list[int] = field(default_factory=list)
    """Tokens among those that generation suppresses which occurred in the captions."""
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    """name -> {shape, fragments: [[start, end, file], ...]}."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """file -> {size, xxh3_128: [of each block of 16 MiB]}."""
    format: int = FORMAT

    @classmethod
    def of(cls, values: dict[str, Any]) -> Manifest:
        """From the file's values. Raises TypeError or KeyError if it is of another version."""
        pairs = {name: tuple(values[name]) for name in ("epoch_base", "position")}
        manifest = cls(**values | pairs)
        if manifest.format != FORMAT:
            raise TypeError(f"format {manifest.format}")
        return manifest


def name_of(step: int, *, unfinished: int | None = None) -> str:
    """Name of the folder of a step's checkpoint; of one that the attempt `unfinished` is writing."""
    name = f"step-{step:08d}"
    return name if unfinished is None else f"{name}.a{unfinished}.tmp"


def find(root: Path) -> list[Path]:
    """All complete checkpoints in a folder, newest first."""
    folders = [
        folder
        for folder in root.glob("step-*")
        if NAME.fullmatch(folder.name) and (folder / MANIFEST).is_file()
    ]
    return sorted(folders, key=lambda folder: folder.name, reverse=True)


class Damaged(CheckpointError):
    """A checkpoint that is proven to be damaged, which one that cannot be read at the moment is not."""


def remove(folder: Path) -> None:
    """Delete a checkpoint; the manifest goes first, so that half of one never counts. What cannot be deleted
    yet (a file that is open on NFS) `clean` takes."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def set_metrics(folder: Path, metrics: dict[str, float]) -> None:
    """Add the metrics of an evaluation to a checkpoint that is there. Raises CheckpointError if it cannot be
    written."""
    manifest, temporary = folder / MANIFEST, folder / f"{MANIFEST}.tmp"
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
        write_synced(temporary, values | {"metrics": metrics})
        temporary.replace(manifest)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot note the metrics of the evaluation: {error}; the checkpoint is intact"
        ) from error


def set_aside(folder: Path) -> Path:
    """Take a damaged checkpoint out of the way, without deleting it; returns where it is now."""
    aside = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def clean(root: Path, attempt: int) -> None:
    """Delete what saves and deletions that were killed have left, but not what attempts later than this one
    write."""
    for folder in root.glob("step-*"):
        writer = UNFINISHED.fullmatch(folder.name)
        is_of_later_attempt = writer is not None and int(writer[1]) > attempt
        is_half_deleted = NAME.fullmatch(folder.name) is not None and not (folder / MANIFEST).is_file()
        if is_half_deleted or (folder.suffix == ".tmp" and not is_of_later_attempt):
            shutil.rmtree(folder, ignore_errors=True)


def retain(root: Path, settings: Checkpoint, metric: str, *, spare: Path | None = None) -> None:
    """Delete the checkpoints that need not be kept, but for `spare`; damaged ones are left for somebody to
    look at."""
    for name in superfluous(_manifests(root), settings, metric):
        if root / name != spare:
            remove(root / name)


def superfluous(manifests: Mapping[str, Manifest], settings: Checkpoint, metric: str) -> list[str]:
    """Of these checkpoints, by name, those to delete: not among the last, not the best by `metric`, not one
    of every so many."""
    kept = {*sorted(manifests)[-settings.keep_last :], best(manifests, metric)}
    if settings.keep_every:
        kept |= {name for name, manifest in manifests.items() if manifest.step % settings.keep_every == 0}
    return [name for name in manifests if name not in kept]


def best(manifests: Mapping[str, Manifest], metric: str) -> str | None:
    """The name of the checkpoint with the best value of a metric; None if none has one."""
    costs = {name: cost(metric, manifest.metrics) for name, manifest in manifests.items()}
    scored = [name for name, value in costs.items() if value < math.inf]
    return min(scored, key=lambda name: (costs[name], name), default=None)


def best_of(root: Path, metric: str) -> Path | None:
    """The checkpoint in a folder that has the best value of a metric; damaged ones do not count."""
    name = best(_manifests(root), metric)
    return root / name if name else None


def lowest_cost(root: Path, metric: str) -> float:
    """The lowest cost (configs/metrics.py) that a checkpoint in a folder has, infinity without one; damaged
    ones do not count."""
    manifests = _manifests(root)
    name = best(manifests, metric)
    return cost(metric, manifests[name].metrics) if name else math.inf


def _manifests(root: Path) -> dict[str, Manifest]:
    """Those of sound checkpoints, by name."""
    manifests = {}
    for folder in find(root):
        with contextlib.suppress(Damaged, ConfigError):  # but not one that cannot be read at the moment
            manifests[folder.name] = Reader(folder).manifest
    return manifests


class Reader:
    """Reads slices of a checkpoint's parameters; every block that is read is checked against its digest."""

    def __init__(self, folder: Path) -> None:
        """Raises Damaged if the manifest is not valid or a file is missing or of another size;
        CheckpointError if it cannot be read; ConfigError if another version wrote it.
        """
        self.folder = folder
        try:
            self.manifest = self._read_manifest()
            self._check_sizes()
        except (ValueError, FileNotFoundError) as error:
            raise Damaged(f"{folder}: not a valid checkpoint: {error}") from None
        except OSError as error:
            raise self._unreadable(error) from error
        self._files: dict[str, FileIO] = {}
        self._offsets: dict[str, dict[str, int]] = {}
        """Where each tensor begins in a file, in bytes."""
        self._checks: dict[tuple[str, int], Future[None]] = {}
        """By file and block."""
        self._pool = ThreadPoolExecutor(2, "digests")

    def _read_manifest(self) -> Manifest:
        values = json.loads((self.folder / MANIFEST).read_bytes())
        try:
            return Manifest.of(values)
        except (TypeError, KeyError):
            raise ConfigError(
                f"{self.folder}: not written in format {FORMAT}, which this version of Earwitness reads"
            ) from None

    def _check_sizes(self) -> None:
        for name, entry in self.manifest.files.items():
            size = (self.folder / name).stat().st_size
            if size != entry["size"]:
                raise Damaged(f"{self.folder / name}: has {size} bytes, should have {entry['size']}: damaged")

    def __call__(self, name: str, kind: str, start: int, end: int) -> torch.Tensor:
        """Elements [start, end) of a flattened parameter's `kind`: (end - start,) float32. Raises
        CheckpointError for damage."""
        out = torch.empty(end - start)
        content = out.view(torch.uint8).numpy().data
        itemsize, filled = out.itemsize, 0
        for first, last, file in self.manifest.parameters[name]["fragments"]:
            low, high = max(first, start), min(last, end)
            if low < high:
                target = content[itemsize * (low - start) : itemsize * (high - start)]
                self._read(file, f"{name}:{kind}", itemsize * (low - first), target)
                filled += high - low
        if filled != end - start:
            raise Damaged(f"{self.folder}: holds {filled} of {end - start} elements of {name}")
        return out

    def verify(self) -> list[str]:
        """Read every byte; what is damaged, a line for each block."""
        problems = []
        for file, entry in self.manifest.files.items():
            for start in range(0, entry["size"], DIGEST_BLOCK):
                try:
                    self._verify(file, start, start + 1)
                except CheckpointError as error:
                    problems.append(str(error))
        return problems

    def tensor(self, name: str) -> torch.Tensor:
        """The fp32 weights of a parameter in its shape."""
        shape = self.manifest.parameters[name]["shape"]
        return self(name, "master", 0, math.prod(shape)).view(shape)

    def _read(self, file: str, key: str, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes of a tensor in a file, from `start` on."""
        if file not in self._offsets:
            self._offsets[file] = self._read_offsets(file)
        begin = self._offsets[file][key] + start
        self._verify(file, begin, begin + len(target))
        self._bytes(file, begin, target)

    def _read_offsets(self, file: str) -> dict[str, int]:
        """Where each tensor begins in a safetensors file, by its header."""
        (length,) = struct.unpack("<Q", self._bytes(file, 0, memoryview(bytearray(8))))
        self._verify(file, 0, 8 + length)
        header = json.loads(bytes(self._bytes(file, 8, memoryview(bytearray(length)))))
        header.pop("__metadata__", None)
        return {key: 8 + length + tensor["data_offsets"][0] for key, tensor in header.items()}

    def _verify(self, file: str, low: int, high: int) -> None:
        """See the blocks that hold the bytes [low, high) checked, each once; the block after them is begun,
        as it is likely to be wanted next."""
        blocks = len(self.manifest.files[file]["xxh3_128"])
        first, end = low // DIGEST_BLOCK, -(-high // DIGEST_BLOCK)
        for block in range(first, min(end + 1, blocks)):
            if (file, block) not in self._checks:
                self._checks[file, block] = self._pool.submit(self._check, file, block)
        for block in range(first, end):
            self._checks[file, block].result()

    def _check(self, file: str, block: int) -> None:
        """Raise Damaged if a block does not fit its digest."""
        entry = self.manifest.files[file]
        start, end = block * DIGEST_BLOCK, min((block + 1) * DIGEST_BLOCK, entry["size"])
        digest, piece = xxh3_128(), memoryview(bytearray(1 << 20))
        for position in range(start, end, len(piece)):
            digest.update(self._bytes(file, position, piece[: end - position]))
        if digest.hexdigest() != entry["xxh3_128"][block]:
            raise Damaged(f"{self.folder / file}: damaged between bytes {start} and {end}")

    def _bytes(self, file: str, start: int, target: memoryview) -> memoryview:
        """Fill `target` from a file. Files are not mapped: what is mapped counts as this process's memory,
        and its pages are slow to come."""
        filled = 0
        while filled < len(target):
            try:
                content = self._files.get(file) or self._files.setdefault(
                    file, (self.folder / file).open("rb", buffering=0)
                )
                count = os.preadv(content.fileno(), [target[filled:]], start + filled)
            except OSError as error:
                raise self._unreadable(error) from error
            if not count:
                raise Damaged(f"{self.folder / file}: ends too soon: damaged")
            filled += count
        return target

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: cannot be read: {error}. That need not be damage, and nothing was changed; mend"
            " the access, and start again."
        )


def safetensors_header(shapes: dict[str, list[int]], dtype: torch.dtype) -> bytes:
    """The beginning of a safetensors file whose tensors follow in this order, without gaps: the header's
    length, and the header."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_synced(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file and see it on disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value))
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """See the names in a folder on disk, where the file system can tell."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
