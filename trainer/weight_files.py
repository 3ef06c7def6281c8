"""The files that hold a model's weights: which of a folder's they are, what is wrong with them, and their
tensors, one at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import ConfigError
from data.kinds import BEGINNING, what_it_is, what_it_stands_for

READ = {
    "model.safetensors": "model.safetensors",
    "model.safetensors.index.json": "model-*-of-*.safetensors",
    "pytorch_model.bin": "pytorch_model.bin",
    "pytorch_model.bin.index.json": "pytorch_model-*-of-*.bin",
}
"""What says that a folder has weights in a form that is read, and the pattern of their files. The first that
is there counts, as in transformers."""
FLOATS = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}
HEADER_BYTES = 100_000_000
"""What safetensors allows."""
FEW = 2
"""Names that are shown."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    shape: list[int]
    dtype: str
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Tensors:
    """The tensors of a model by name. path: the file, or the index of several."""

    path: Path
    by_name: dict[str, Stored]

    def __getitem__(self, name: str) -> Tensor:
        return self.by_name[name].read()

    @property
    def shapes(self) -> dict[str, list[int]]:
        """By name."""
        return {name: stored.shape for name, stored in self.by_name.items()}

    def prefixed(self, prefix: str) -> Tensors:
        """The same tensors under longer names."""
        return replace(self, by_name={prefix + name: stored for name, stored in self.by_name.items()})

    def check_values(self) -> None:
        """Read every tensor. Raises ConfigError for those with NaN or infinite values, and for weights that
        are nothing but zeros: of a training that went wrong, or a file that was not wholly written."""
        not_finite, zero = [], []
        for name, (low, high) in self._extremes().items():
            if not (low.isfinite() and high.isfinite()):
                not_finite.append(name)
            elif name.endswith(".weight") and not low and not high:  # a bias may be
                zero.append(name)
        for what, names in (("values that are NaN or infinite", not_finite), ("nothing but zeros", zero)):
            if names:
                raise ConfigError(
                    f"{self.by_name[names[0]].file}: {what} in {few(names)}, of {len(self.by_name)} tensors."
                    " Its training went wrong, or it was not wholly copied: take an earlier checkpoint, or"
                    " fetch it again"
                )

    def _extremes(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The least and the largest value of each tensor, NaN where it has any."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more of them take ten times as long where cores are shared
        try:
            return {name: stored.read().aminmax() for name, stored in self.by_name.items()}
        finally:
            torch.set_num_threads(threads)


def find(folder: Path) -> Tensors | None:
    """The weights of a folder; None if it holds none in any form. Raises ConfigError for those that cannot be
    read."""
    path = next((folder / name for name in READ if (folder / name).exists()), None)
    if path is None:
        return None
    files = _shards(path) if path.suffix == ".json" else [path]
    weights = Tensors(path, {name: stored for file in files for name, stored in _tensors(file)})
    others = [name for name, stored in weights.by_name.items() if stored.dtype not in FLOATS]
    if others:
        raise ConfigError(
            f"{path}: {few(others)}: whole numbers or 8 bits ({weights.by_name[others[0]].dtype}), as in"
            " quantized models, which cannot be trained: take the model in FP32, BF16 or FP16"
        )
    return weights


def few(names: Iterable[str]) -> str:
    """Some names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more


def read_json(file: Path) -> dict[str, Any]:
    """An object of JSON. Raises ConfigError."""
    try:
        content = file.read_bytes()
        values = json.loads(content)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        what = what_it_stands_for(content) or (what_it_is(content) if not content.strip(b"\0") else "")
        raise ConfigError(f"{file}: {f'is {what}' if what else f'the JSON is broken: {error}'}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: is not an object of JSON; fetch it again")
    return values


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ConfigError(f"{index}: names no files (weight_map); fetch it again")
    files = sorted({index.parent / str(name) for name in names.values()})
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ConfigError(
            f"{index}: {few(missing)} of the {len(files)} files that it names are missing; fetch them, too"
        )
    return files


def _tensors(file: Path) -> Iterator[tuple[str, Stored]]:
    return _of_safetensors(file) if file.suffix == ".safetensors" else _of_pickle(file)


def _of_safetensors(file: Path) -> Iterator[tuple[str, Stored]]:
    _check_length(file)
    try:
        opened = safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}; fetch it again") from None
    for name in opened.keys():  # noqa: SIM118
        part = opened.get_slice(name)
        yield name, Stored(file, part.get_shape(), part.get_dtype(), partial(opened.get_tensor, name))


def _check_length(file: Path) -> None:
    """Raise ConfigError if a safetensors file is something else, or shorter than its header says."""
    beginning, size = _beginning(file)
    (length,) = struct.unpack("<Q", beginning[:8].ljust(8, b"\0"))
    if beginning[8:9] != b"{" or length > min(size - 8, HEADER_BYTES):
        what = what_it_is(beginning)
        if beginning[8:9] == b"{" and length <= HEADER_BYTES:
            what = f"cut off: {size:,} bytes, less than its header alone"
        raise ConfigError(f"{file}: is {what or 'no safetensors file'}; fetch it again")
    with file.open("rb") as opened:
        opened.seek(8)
        try:
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file}: its header is damaged ({error}); fetch it again") from None
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        raise ConfigError(
            f"{file}: is cut off: {size:,} bytes of {whole:,} are there; fetch it again (was the disk full?)"
        )


def _beginning(file: Path) -> tuple[bytes, int]:
    """The first bytes of a file, and how many it has. Raises ConfigError."""
    try:
        with file.open("rb") as opened:
            return opened.read(BEGINNING), file.stat().st_size
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None


def _of_pickle(file: Path) -> Iterator[tuple[str, Stored]]:
    beginning, size = _beginning(file)
    is_zip = beginning.startswith(b"PK\x03\x04")
    if not is_zip and not beginning.startswith(b"\x80"):
        raise ConfigError(
            f"{file}: is {what_it_is(beginning) or 'no file that torch.save wrote'}; fetch it again"
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # of zip, pickle and torch, one for each way to be damaged
        words = str(error).split(". ")[0] or type(error).__name__
        raise ConfigError(
            f"{file}: is damaged or cut off ({size:,} bytes), or holds more than tensors ({words}); fetch it"
            " again, or save the model with save_pretrained"
        ) from None
    tensors = content if isinstance(content, dict) else {}
    others = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
    if others or not tensors:
        inner = f" ({few(others)})" if others else ""
        raise ConfigError(
            f"{file}: holds no tensors by name, but what a training program keeps{inner}: load it there, and"
            " save the model with save_pretrained"
        )
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield str(name), Stored(file, list(tensor.shape), dtype, partial(cast, Tensor, tensor))
