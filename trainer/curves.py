"""TensorBoard's files of a run, which sort by attempt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

NAME = re.compile(r"events\.out\.tfevents\.(\d+)\.(.*)")
"""Of a file: the second in which it was made, and by whom."""


def open_curves(folder: Path, purge_step: int) -> SummaryWriter:
    """A writer whose file comes after all that earlier attempts have left in a folder.

    purge_step: what was drawn from this step on is taken back. TensorBoard reads files in the order of their
    names, which begin with the time, and never goes back: the file of a node whose clock is behind would not
    be read at all. Such a one gets the second after the newest.
    """
    newest = max((_second(path) for path in folder.glob("events.out.tfevents.*")), default=0)
    writer = SummaryWriter(str(folder), purge_step=purge_step)
    writer.flush()
    files: Any = writer.file_writer
    events = files.event_writer
    path = Path(events._file_name)
    if _second(path) <= newest:
        later = path.with_name(NAME.sub(rf"events.out.tfevents.{newest + 1:010d}.\2", path.name))
        path.rename(later)
        events._general_file_writer.filename = str(later)  # it opens its file by name at each flush
    return writer


def _second(path: Path) -> int:
    name = NAME.fullmatch(path.name)
    return int(name[1]) if name else 0
