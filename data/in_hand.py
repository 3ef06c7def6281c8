"""The samples that are being decoded, in a file that outlives the process; so that one whose decoder crashes
or never ends is not tried for ever."""

from __future__ import annotations

import mmap
import re
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.rundir import RunDir

SLOT = struct.Struct("<Qd1008s")
"""Thread (0: the slot is free), begin, and key NUL shard in UTF-8: 1 KiB."""
THREAD = struct.Struct("<Q")
DEATHS = 2
"""Attempts that a sample ends before it is left out. The first time may be chance: another one may have
damaged the memory."""
POISONED = f"its decoder crashed or never ended in {DEATHS} attempts"
CRASH = re.compile(r"^Fatal Python error: (.+)\n(?:.*\n)*?Current thread 0x([0-9a-f]+)", re.MULTILINE)
"""What faulthandler writes of a signal like SIGSEGV: its name, and the thread that it has struck, if that is
one of Python's."""


@dataclass(frozen=True)
class Held:
    """A sample that is being decoded. thread: as threading.get_ident gives it; began: s, time.monotonic."""

    thread: int
    began: float
    shard: str
    key: str


@dataclass(frozen=True)
class Death:
    """A sample that its decoder has not survived. how: as in "Segmentation fault"."""

    attempt: int
    rank: int
    key: str
    shard: str
    how: str

    def __str__(self) -> str:
        return f"{self.how} while sample {self.key} of {self.shard} was decoded"


class InHand:
    """The record of one rank. Safe to use from as many threads as it has slots."""

    def __init__(self, slots: int, path: Path | None = None) -> None:
        """path: the file; without one the record ends with the process."""
        empty = bytes(slots * SLOT.size)
        if path is None:
            self._memory = mmap.mmap(-1, len(empty))
        else:
            path.write_bytes(empty)  # a hole would end in SIGBUS when the disk is full
            with path.open("r+b") as file:
                self._memory = mmap.mmap(file.fileno(), 0)
        self._free = deque(range(0, len(empty), SLOT.size))

    @contextmanager
    def holding(self, key: str, shard: str) -> Iterator[None]:
        """Note a sample while this thread decodes it."""
        slot = self._free.pop()
        SLOT.pack_into(
            self._memory,
            slot,
            threading.get_ident(),
            time.monotonic(),
            f"{key}\0{shard}".encode(errors="replace"),
        )
        try:
            yield
        finally:
            THREAD.pack_into(self._memory, slot, 0)
            self._free.append(slot)

    def now(self) -> list[Held]:
        """What is being decoded, the longest first."""
        return sorted(_held(self._memory[:]), key=lambda held: held.began)

    def record_endless(self, run: RunDir, attempt: int, rank: int, patience: float) -> list[Held]:
        """Before a hung rank is ended: write into the ledger what has been in hand for longer than `patience`
        seconds; the longest comes first."""
        endless = [held for held in self.now() if time.monotonic() - held.began > patience]
        for held in endless:
            _record(run, Death(attempt, rank, held.key, held.shard, "never ended"))
        return endless


def read(path: Path) -> list[Held]:
    """What a rank had in hand when it ended."""
    return _held(path.read_bytes())


def deaths(run: RunDir, attempt: int) -> list[Death]:
    """The samples in the decoding of which a rank of this attempt has crashed.

    Other deaths (SIGKILL, an error) are not their fault: they only happened to be in hand; as were those of
    other threads than the one that crashed.
    """
    found = []
    for file in sorted(run.attempt_logs(attempt).glob("rank-*.fatal")):
        crash = CRASH.search(file.read_text(errors="replace", encoding="utf-8"))
        record = file.with_suffix(".inhand")
        if crash and record.is_file():
            rank = int(file.stem.removeprefix("rank-"))
            found += [
                Death(attempt, rank, held.key, held.shard, crash[1])
                for held in read(record)
                if held.thread == int(crash[2], 16)
            ]
    return found


def find_poisoned(run: RunDir, attempt: int) -> frozenset[str]:
    """Keys of the samples that are no longer tried. Writes into the ledger first what attempts before this
    one died of; one rank calls it."""
    lines = run.ledger()
    known = {(line["attempt"], line["rank"]) for line in lines if line["event"] == "death_in_hand"}
    looked = max(
        (line["attempt"] for line in lines if line["event"] == "start"), default=0
    )  # it has itself looked at those before it
    for before in range(looked, attempt):
        for death in deaths(run, before):
            if (death.attempt, death.rank) not in known:
                print(f"attempt {death.attempt}, rank {death.rank}: {death}", flush=True)
                _record(run, death)
    attempts: dict[str, set[int]] = {}
    for line in run.ledger("death_in_hand"):
        attempts.setdefault(line["key"], set()).add(line["attempt"])
    return frozenset(key for key, of_key in attempts.items() if len(of_key) >= DEATHS)


def _record(run: RunDir, death: Death) -> None:
    run.record("death_in_hand", **asdict(death))


def _held(memory: bytes) -> list[Held]:
    held = []
    for thread, began, text in SLOT.iter_unpack(memory):
        key, _, shard = text.rstrip(b"\0").decode(errors="replace").partition("\0")
        if thread:
            held.append(Held(thread, began, shard, key))
    return held
