"""The folder of a run: where things lie, and the ledger that says what happened."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from configs.errors import ConfigError
from configs.load import dump, load
from configs.schema import RunConfig

PACKAGES = ("configs", "data", "trainer", "slurm", "launch", "tools")
"""What a run's jobs need of a checkout."""


class RunDir:
    """Paths of `runs/NAME/`, and its append-only files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.next_config = self.path / "config.next.yaml"
        """What a start asks for; it becomes config.yaml when the run has accepted it."""
        self.base = self.path / "base"
        """The model's config, tokenizer, processor, generation config and the tensors that are not
        trained."""
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.events = self.path / "events.jsonl"
        self.quarantine = self.path / "quarantine.jsonl"
        self.audit = self.path / "audit"
        self.logs = self.path / "logs"
        self.leases = self.path / "leases"
        """Who is at work on the run (configs/lease.py)."""
        self.code = self.path / "code"
        """The code that its jobs run."""
        self.pretrained = self.path / "pretrained"
        """The model to start from, if it came from a hub: compute nodes need no network."""
        self.slurm = self.path / "slurm"
        """The script of its jobs, what they printed (JOB.log), and how they ended (jobs/JOB)."""

    @classmethod
    def create(cls, config: RunConfig) -> RunDir:
        """Make the folder of a run, or take it up again. Raises ConfigError if it cannot be written."""
        run = cls(config.run.dir)
        try:
            for folder in (run.checkpoints, run.leases):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except OSError as error:
            raise ConfigError(
                f"{run.path}: cannot write the run's folder: {error.strerror}; set run.dir to a place that"
                " you may write"
            ) from None
        return run

    def attempt_logs(self, attempt: int) -> Path:
        """The folder of what the ranks of an attempt leave: rank-RRRRR.log, .error, .fatal, .inhand."""
        return self.logs / f"attempt-{attempt:06d}"

    def ask(self, config: RunConfig) -> None:
        """Leave the config that the next start asks for."""
        write_atomic(self.next_config, dump(config))

    def read_config(self) -> RunConfig:
        """The resolved config of this run. Raises ConfigError if this folder is none."""
        if not self.config.is_file():
            raise ConfigError(
                f"{self.path}: not the folder of a run that has started (it has no config.yaml)"
            )
        return load(self.config)

    def read_next_config(self) -> RunConfig:
        """The config that this start asks for, or that of the run."""
        return load(self.next_config) if self.next_config.is_file() else self.read_config()

    def accept_config(self) -> None:
        """The run goes on with what was asked for."""
        if self.next_config.is_file():
            self.next_config.replace(self.config)

    def record(self, event: str, **fields: Any) -> None:
        """Append one line to the ledger."""
        append_line(self.events, {"time": round(time.time(), 3), "event": event, **fields})

    def ledger(self, event: str | None = None) -> list[dict[str, Any]]:
        """All lines of the ledger, or those of one event, oldest first."""
        return [line for line in read_lines(self.events) if event in (None, line["event"])]

    def unusable(self) -> dict[tuple[str, str], list[str]]:
        """Keys of the samples that could not be used, by source and reason (numbers in it aside); the
        commonest first."""
        found: dict[tuple[str, str], list[str]] = {}
        for key, line in {line["key"]: line for line in read_lines(self.quarantine)}.items():
            found.setdefault((key.partition("/")[0], re.sub(r"\d[\d.,]*", "N", line["reason"])), []).append(
                key
            )
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def saved_step(self) -> int:
        """Step of the newest checkpoint, as the ledger tells; 0 before the first one."""
        return next((int(line["step"]) for line in reversed(self.ledger("checkpoint"))), 0)

    def next_attempt(self) -> int:
        """Number of the attempt that starts now: 0, 1, ..."""
        return 1 + max((line["attempt"] for line in self.ledger("attempt")), default=-1)


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append a JSON line in one write, so that ranks may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"  # a full disk has cut the last line off
        os.write(descriptor, ("\n" * bool(torn) + json.dumps(value, ensure_ascii=False) + "\n").encode())
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; a line cut off by a crash is left out."""
    if not path.exists():
        return []
    values = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return values


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see the old or the new content, never a part."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
