"""TensorBoard's files of a run, which sort by attempt. A disk that does not take them ends no training."""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from configs.disk import naming, words_of_disk
from trainer.layout import Chart, layout

NAME = re.compile(r"events\.out\.tfevents\.(\d+)\.(.*)")
"""Of a file: the second in which it was made, and by whom."""
PROBE = 1 << 16
"""Bytes that must fit into the folder at first: TensorBoard's own thread, which an error ends, begins the
file."""
KEPT = 64 << 20
"""Bytes that are kept for a disk that may take them later."""


class Curves:
    """What an attempt draws. Without a folder that can be written nothing is drawn; each `flush` looks
    again."""

    def __init__(self, folder: Path, purge_step: int, names: Collection[str] = ()) -> None:
        """purge_step: what was drawn from this step on is taken back; names: of curves that earlier attempts
        have drawn."""
        self._folder, self._purge_step = folder, purge_step
        self._writer: SummaryWriter | None = None
        self._trouble = _Trouble()
        self._names = set(names)
        self._layout: dict[str, dict[str, Chart]] = {}
        self.flush()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Draw a point on each curve."""
        if self._writer:
            self._names.update(values)
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Show a text, in Markdown."""
        if self._writer:
            self._writer.add_text(tag, text, step)

    def audio(self, tag: str, waveform: torch.Tensor, rate: int, step: int) -> None:
        """Let a clip be heard. waveform: (1, n) float32."""
        if self._writer:
            self._writer.add_audio(tag, waveform, step, rate)

    def image(self, tag: str, picture: torch.Tensor, step: int) -> None:
        """Show a picture. picture: (3, height, width) uint8."""
        if self._writer:
            self._writer.add_image(tag, picture, step)

    def flush(self) -> None:
        """Let others see what was drawn."""
        if self._writer:
            self._arrange(self._writer)
            self._writer.flush()
            return
        try:
            self._writer = open_curves(self._folder, self._purge_step, self._trouble)
        except OSError as error:
            self._trouble.begins(error)
        else:
            self._trouble.ends()

    def close(self, patience: float = 0.0) -> None:
        """Nothing more is drawn. patience: of services; files have no use for it."""
        if self._writer:
            self._arrange(self._writer)
            self._writer.close()

    def _arrange(self, writer: SummaryWriter) -> None:
        """Let the first look show all curves that there are by now."""
        arranged = layout(self._names)
        if arranged != self._layout:
            writer.add_custom_scalars(arranged)
            self._layout = arranged


class _Trouble:
    """Says once that curves cannot be written, and once that they can."""

    def __init__(self) -> None:
        self._told = False

    def begins(self, error: OSError) -> None:
        if not self._told:
            print(f"no curves for now, training goes on: {words_of_disk(error) or error}", flush=True)
        self._told = True

    def ends(self) -> None:
        if self._told:
            print("the curves go on", flush=True)
        self._told = False


def open_curves(folder: Path, purge_step: int, trouble: _Trouble | None = None) -> SummaryWriter:
    """A writer whose file comes after all that earlier attempts have left in a folder. Raises OSError; the
    writer does not, and tells `trouble`.

    purge_step: what was drawn from this step on is taken back. TensorBoard reads files in the order of their
    names, which begin with the time, and never goes back: the file of a node whose clock is behind would not
    be read at all. Such a one gets the second after the newest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with naming(folder), tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(PROBE))
    newest = max((_second(path) for path in folder.glob("events.out.tfevents.*")), default=0)
    writer = SummaryWriter(str(folder), purge_step=purge_step)
    writer.flush()
    files: Any = writer.file_writer
    events = files.event_writer
    path = Path(events._file_name)
    if _second(path) <= newest:
        path = path.rename(path.with_name(NAME.sub(rf"events.out.tfevents.{newest + 1:010d}.\2", path.name)))
    events._async_writer._writer._writer = _File(path, trouble or _Trouble())
    return writer


class _File:
    """An event file in place of TensorBoard's own, which an error would end together with the thread that
    writes. What a disk does not take is kept and written when it does."""

    closed = False

    def __init__(self, path: Path, trouble: _Trouble) -> None:
        self._path, self._trouble = path, trouble
        self._size = path.stat().st_size
        """Bytes of whole records."""
        self._pending, self._lock = bytearray(), threading.Lock()

    def write(self, record: bytes) -> None:
        with self._lock:
            if len(self._pending) > KEPT:
                self._pending.clear()
            self._pending += record

    def flush(self) -> None:
        with self._lock:
            try:
                self._append()
            except OSError as error:
                self._trouble.begins(error)
            else:
                self._trouble.ends()

    def close(self) -> None:
        self.flush()
        self.closed = True

    def _append(self) -> None:
        with naming(self._path), self._path.open("ab") as file:
            self._size = min(self._size, file.tell())  # somebody may have removed it
            file.truncate(self._size)  # a full disk took a part of a record, which would hide all that follow
            file.write(self._pending)
        self._size += len(self._pending)
        self._pending.clear()


def _second(path: Path) -> int:
    name = NAME.fullmatch(path.name)
    return int(name[1]) if name else 0
