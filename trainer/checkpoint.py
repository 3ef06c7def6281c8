"""Checkpoints without world size, engine or pickle: fragments of named parameters in safetensors files, and a manifest.

    checkpoints/step-00001000/rank-00000-of-00002.safetensors   `NAME:KIND`: 1-D float32 fragments of this rank
                              manifest.json                     where every [start, end) of every parameter lies, digests, step

A folder without a valid manifest does not exist. Writing goes to `step-N.aATTEMPT.tmp`, which is renamed when all is on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configs.errors import CheckpointError
from trainer.distributed import World
from trainer.engines import KINDS, Engine

FORMAT = 1
DIGEST_BLOCK = 16 << 20
"""Bytes per SHA-256, so that a reader can trust a slice without reading the whole file."""
NAME = re.compile(r"step-(\d{8})")
ADVICE = "delete that folder to go on from the checkpoint before"


@dataclass
class Manifest:
    """What a checkpoint is."""

    step: int
    """Optimizer steps taken; the position in the data follows from it."""
    updates: int
    """AdamW's own counter: steps less the skipped ones."""
    identity: dict[str, Any]
    """What must be the same for the run to go on exactly: seed, global batch, index digest."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last evaluation's."""
    caption_tokens: list[int] = field(default_factory=list)
    """Tokens among those that generation suppresses which occurred in the captions."""
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    """name -> {shape, fragments: [[start, end, file], ...]}."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """file -> {size, sha256: [of each block of 16 MiB]}."""
    format: int = FORMAT


def save(root: Path, engine: Engine, world: World, manifest: Manifest, shapes: dict[str, list[int]], attempt: int) -> Path:
    """Write a checkpoint; all ranks call it. Returns its folder.

    Raises CheckpointError on every rank if one could not write (disk full, no permission); earlier checkpoints stay as they are.
    """
    final = root / f"step-{manifest.step:08d}"
    temporary = root / f"{final.name}.a{attempt}.tmp"
    file = temporary / f"rank-{world.rank:05d}-of-{world.size:05d}.safetensors"

    def write() -> None:
        temporary.mkdir(parents=True, exist_ok=True)
        fragments = engine.fragments()
        save_file({f"{f.name}:{kind}": f.tensors[kind].cpu() for f in fragments for kind in KINDS}, file)
        file.chmod(0o666 & ~_umask())  # safetensors writes 0600
        _sync(file)
        about = {"size": file.stat().st_size, "sha256": _digests(file)}
        _write_synced(file.with_suffix(".json"), {"file": {file.name: about}, "fragments": [[f.name, f.start, f.end] for f in fragments]})

    def commit() -> None:
        if world.rank != 0:
            return
        for done_file in sorted(temporary.glob("rank-*.json")):
            done = json.loads(done_file.read_text())
            manifest.files |= done["file"]
            for name, start, end in done["fragments"]:
                entry = manifest.parameters.setdefault(name, {"shape": shapes[name], "fragments": []})
                entry["fragments"].append([start, end, next(iter(done["file"]))])
            done_file.unlink()
        _write_synced(temporary / "manifest.json", asdict(manifest))
        _sync(temporary)
        if final.exists():
            remove(final)
        temporary.rename(final)
        _sync(root)

    for part in (write, commit):
        problem = None
        try:
            part()
        except (OSError, SafetensorError) as error:
            problem = error
        if world.sum([problem is not None])[0]:  # all ranks learn of it, and leave together
            if world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"{temporary}: cannot write the checkpoint of step {manifest.step}: {problem or 'another rank failed'}. "
                "Earlier checkpoints are intact; make room or mend the folder, and start again."
            )
    return final


def find(root: Path) -> list[Path]:
    """All complete checkpoints in a folder, newest first."""
    folders = [folder for folder in root.glob("step-*") if NAME.fullmatch(folder.name) and (folder / "manifest.json").is_file()]
    return sorted(folders, key=lambda folder: folder.name, reverse=True)


def remove(folder: Path) -> None:
    """Delete a checkpoint; the manifest goes first, so that half of one never counts."""
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def retain(root: Path, keep_last: int, keep_every: int | None, metric: str) -> None:
    """Delete what is not to be kept: not among the last, not the best by `metric`, not a multiple of `keep_every`. Also leftovers."""
    for leftover in root.glob("step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    _, best = best_of(root, metric)
    for folder in find(root)[keep_last:]:
        step = int(folder.name.removeprefix("step-"))
        if folder != best and not (keep_every and step % keep_every == 0):
            remove(folder)


def best_of(root: Path, metric: str) -> tuple[float, Path | None]:
    """The lowest value of a metric, and the checkpoint that has it (infinity and None without one); damaged checkpoints do not count."""
    scored: list[tuple[float, Path]] = []
    for folder in find(root):
        with contextlib.suppress(CheckpointError):
            scored.append((Reader(folder).manifest.metrics.get(metric, math.inf), folder))
    finite = [(value, folder) for value, folder in scored if math.isfinite(value)]
    return min(finite) if finite else (math.inf, None)


class Reader:
    """Reads slices of a checkpoint's parameters; every block that is read is checked against its digest."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError if the manifest is not valid or a file is missing or of another size."""
        self.folder = folder
        try:
            values = json.loads((folder / "manifest.json").read_text())
            if values["format"] != FORMAT:
                raise CheckpointError(f"{folder}: written in format {values['format']}, this version reads {FORMAT}")
            self.manifest = Manifest(**values)
            for name, about in self.manifest.files.items():
                if (size := (folder / name).stat().st_size) != about["size"]:
                    raise CheckpointError(f"{folder / name}: has {size} bytes, should have {about['size']}: damaged; {ADVICE}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder}: not a valid checkpoint: {error}") from None
        self._files: dict[str, tuple[np.memmap[Any, Any], dict[str, Any]]] = {}
        self._sound: set[tuple[str, int]] = set()

    def __call__(self, name: str, kind: str, start: int, end: int) -> torch.Tensor:
        """Elements [start, end) of a flattened parameter's `kind`: (end - start,) float32. Raises CheckpointError for damage."""
        out = torch.empty(end - start)
        filled = 0
        for first, last, file in self.manifest.parameters[name]["fragments"]:
            low, high = max(first, start), min(last, end)
            if low < high:
                out[low - start : high - start] = self._slice(file, f"{name}:{kind}", low - first, high - first)
                filled += high - low
        if filled != end - start:
            raise CheckpointError(f"{self.folder}: holds {filled} of {end - start} elements of {name}")
        return out

    def verify(self) -> list[str]:
        """Read every byte; what is damaged, a line for each block."""
        problems = []
        for file, about in self.manifest.files.items():
            content = np.memmap(self.folder / file, np.uint8, "r")
            for start in range(0, about["size"], DIGEST_BLOCK):
                try:
                    self._verify(file, content, start, min(start + DIGEST_BLOCK, about["size"]))
                except CheckpointError as error:
                    problems.append(str(error))
        return problems

    def tensor(self, name: str) -> torch.Tensor:
        """The fp32 weights of a parameter in its shape."""
        shape = self.manifest.parameters[name]["shape"]
        return self(name, "master", 0, int(np.prod(shape))).view(shape)

    def _slice(self, file: str, key: str, start: int, end: int) -> torch.Tensor:
        if file not in self._files:
            content = np.memmap(self.folder / file, np.uint8, "r")
            (length,) = struct.unpack("<Q", content[:8].tobytes())
            self._verify(file, content, 0, 8 + length)
            header = json.loads(content[8 : 8 + length].tobytes())
            self._files[file] = content, {name: 8 + length + about["data_offsets"][0] for name, about in header.items() if name != "__metadata__"}
        content, offsets = self._files[file]
        low, high = offsets[key] + 4 * start, offsets[key] + 4 * end
        self._verify(file, content, low, high)
        return torch.frombuffer(bytearray(content[low:high]), dtype=torch.float32)

    def _verify(self, file: str, content: np.memmap[Any, Any], low: int, high: int) -> None:
        for block in range(low // DIGEST_BLOCK, -(-high // DIGEST_BLOCK)):
            if (file, block) in self._sound:
                continue
            found = hashlib.sha256(content[block * DIGEST_BLOCK : (block + 1) * DIGEST_BLOCK].data).hexdigest()
            if found != self.manifest.files[file]["sha256"][block]:
                raise CheckpointError(f"{self.folder / file}: damaged between bytes {block * DIGEST_BLOCK} and {(block + 1) * DIGEST_BLOCK}; {ADVICE}")
            self._sound.add((file, block))


def _digests(file: Path) -> list[str]:
    with file.open("rb") as content:
        return [hashlib.sha256(block).hexdigest() for block in iter(lambda: content.read(DIGEST_BLOCK), b"")]


def _write_synced(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
