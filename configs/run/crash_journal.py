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
from dataclasses import dataclass
from pathlib import Path

from configs.disk import naming
from configs.run.events import DeathInHand, TrainingBegan
from configs.run.folder import RunDir

SLOT = struct.Struct("<Qd1008s")
"""Thread (0: the slot is free), begin, and key NUL shard in UTF-8: 1 KiB."""
THREAD = struct.Struct("<Q")
DEATHS = 2
"""Attempts that a sample ends before it is left out. The first time may be chance: another one may have
damaged the memory."""
POISONED = f"its decoder crashed or never ended in {DEATHS} attempts"
CRASH = re.compile(r"^Fatal Python error: (.+)\n(?:.*\n)*?Current thread 0x([0-9a-f]+)", re.MULTILINE)
"""What faulthandler writes of a signal like SIGSEGV: its name, and the thread that received it, where that is
one of Python's."""


@dataclass(frozen=True)
class Held:
    """A sample that is being decoded. thread: as threading.get_ident gives it; began: s, time.monotonic."""

    thread: int
    began: float
    shard: str
    key: str


class CrashJournal:
    """What one rank has in hand. Safe to use from as many threads as it has slots."""

    def __init__(self, slots: int, path: Path | None = None) -> None:
        """path: the file; without one the record ends with the process."""
        empty = bytes(slots * SLOT.size)
        if path is None:
            self._memory = mmap.mmap(-1, len(empty))
        else:
            with naming(path):
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

    def endless(self, seconds: float) -> list[Held]:
        """What has been in hand for longer than that; the longest comes first."""
        return [held for held in self.now() if time.monotonic() - held.began > seconds]


def read(path: Path) -> list[Held]:
    """What a rank had in hand when it ended."""
    return _held(path.read_bytes())


def deaths(run: RunDir, attempt: int) -> list[DeathInHand]:
    """The samples in the decoding of which a rank of this attempt has crashed.

    Other deaths (SIGKILL, an error) are not their fault: they only happened to be in hand; as were those of
    other threads than the one that crashed.
    """
    deaths = []
    for trace in sorted(run.attempt_logs(attempt).glob("rank-*.fatal")):
        crash = CRASH.search(trace.read_text(errors="replace", encoding="utf-8"))
        in_hand = trace.with_suffix(".inhand")
        if crash is None or not in_hand.is_file():
            continue
        signal_name, thread = crash[1], int(crash[2], 16)
        rank = int(trace.stem.removeprefix("rank-"))
        deaths += [
            DeathInHand(attempt=attempt, rank=rank, key=held.key, shard=held.shard, how=signal_name)
            for held in read(in_hand)
            if held.thread == thread
        ]
    return deaths


def find_poisoned(run: RunDir, attempt: int) -> frozenset[str]:
    """Keys of the samples that are no longer tried. Writes into the ledger first what attempts before this
    one died of; one rank calls it."""
    history = run.ledger.read()
    known = {(death.attempt, death.rank) for death in history.of(DeathInHand)}
    # The last attempt that has started has itself looked at those before it.
    last_look = max((started.attempt for started in history.of(TrainingBegan)), default=0)
    for before in range(last_look, attempt):
        for death in deaths(run, before):
            if (death.attempt, death.rank) not in known:
                print(f"attempt {death.attempt}, rank {death.rank}: {death}", flush=True)
                run.ledger.record(death)
    attempts: dict[str, set[int]] = {}
    for death in run.ledger.read().of(DeathInHand):
        attempts.setdefault(death.key, set()).add(death.attempt)
    return frozenset(key for key, ended in attempts.items() if len(ended) >= DEATHS)


def _held(memory: bytes) -> list[Held]:
    held = []
    for thread, began, text in SLOT.iter_unpack(memory):
        key, _, shard = text.rstrip(b"\0").decode(errors="replace").partition("\0")
        if thread:
            held.append(Held(thread, began, shard, key))
    return held
