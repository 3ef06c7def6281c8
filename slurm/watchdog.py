"""Turns a hang into a report and an exit. Every rank has a watchdog, which is given a sign of life in every
phase.

Whichever notices first asks the others, through a file in the attempt's log folder, what they are doing;
ranks that do not even answer are the first suspects, then those that have not arrived where the others wait.
Where Python itself is stuck (a call that holds the interpreter), faulthandler's own thread ends the process a
little later.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FIRST_PATIENCE = 1800.0
"""Seconds that a phase may take of which nothing is known."""
PATIENT = ("starting", "saving")
"""Phases that may last as long as that at any time: a disk may be slow."""
LEAST_PATIENCE = 120.0
FACTOR = 20
"""Times the longest that a phase took so far."""
TICK = 1.0
GATHER = 10.0
"""Seconds in which the others can say what they are doing."""
STUCK = 5.0
"""Seconds without a sign after which a rank looks whether another one has noticed a hang."""
HUNG = 70
"""Exit code of a rank that hangs."""


@dataclass(frozen=True)
class Sign:
    """What a rank was doing. arrived: it waits for the others at an agreement; seconds: since its last sign
    of life; in_hand: a sample that it decodes."""

    rank: int
    node: str
    phase: str
    step: int
    arrived: bool
    seconds: float
    in_hand: str = ""


@dataclass(frozen=True)
class Hang:
    """A hang in words, and the node that seems to be at fault (empty if none does)."""

    words: str
    node: str
    suspects: list[int]


class Watchdog:
    """Of one rank. Signs of life are `watch(phase, step)` and `watch.arrive()`."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        nodes: Sequence[str],
        *,
        seconds: float | None = None,
        in_hand: Callable[[float], str] = lambda patience: "",
        report: Callable[[Hang], None],
        orphaned: Callable[[], bool] = lambda: False,
    ) -> None:
        """nodes: that of each rank; seconds: how long a known phase may last (`slurm.hang_seconds`);
        in_hand: what has been in hand for longer than that many seconds;
        orphaned: whether a later attempt has taken over."""
        self._folder, self._rank, self._nodes, self._seconds = folder, rank, nodes, seconds
        self._in_hand, self._report, self._orphaned = in_hand, report, orphaned
        self._phase, self._step, self._arrived = "starting", 0, False
        self._last, self._armed = time.monotonic(), 0.0
        self._longest: dict[tuple[str, bool], float] = {}
        self._closed = threading.Event()
        self._stacks = (folder / f"rank-{rank:05d}.stacks").open("w", encoding="utf-8")
        self._arm()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def __call__(self, phase: str, step: int) -> None:
        """This rank enters a phase, or goes on in it."""
        self._sign(phase, step, arrived=False)

    def arrive(self) -> None:
        """This rank waits for the others."""
        self._sign(self._phase, self._step, arrived=True)

    def _sign(self, phase: str, step: int, arrived: bool) -> None:
        now, was = time.monotonic(), (self._phase, self._arrived)
        self._longest[was] = max(self._longest.get(was, 0.0), now - self._last)
        self._last, self._phase, self._step, self._arrived = now, phase, step, arrived
        if (phase, arrived) != was or now - self._armed > STUCK:
            self._arm()

    def _arm(self) -> None:
        self._armed = time.monotonic()
        faulthandler.dump_traceback_later(self.patience + 3 * GATHER, exit=True, file=self._stacks)

    @property
    def patience(self) -> float:
        """Seconds that the present phase may last."""
        known = self._longest.get((self._phase, self._arrived))
        if known is None or self._phase in PATIENT:
            return FIRST_PATIENCE
        return self._seconds or max(LEAST_PATIENCE, 3 * known, min(FACTOR * known, FIRST_PATIENCE))

    def close(self) -> None:
        """The end: what comes now may take its time."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        Path(self._stacks.name).unlink(missing_ok=True)

    def _watch(self) -> None:
        asked, looked = self._folder / "hang", 0.0
        while not self._closed.wait(TICK):
            now = time.monotonic()
            idle = now - self._last
            if idle > STUCK + GATHER and now - looked > GATHER:
                looked = now
                with contextlib.suppress(OSError):  # a file system that does not answer
                    self._leave_if_orphaned()
            if idle > self.patience or (idle > STUCK and asked.exists()):
                try:
                    self._hang(asked, idle)
                finally:  # whatever cannot be written
                    os._exit(HUNG)

    def _leave_if_orphaned(self) -> None:
        if self._orphaned():
            print(
                "a later attempt has taken over this run, and this rank is stuck: it leaves",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

    def _hang(self, asked: Path, idle: float) -> None:
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(self._stacks, all_threads=True)
            self._stacks.flush()
        sign = Sign(
            self._rank,
            self._nodes[self._rank],
            self._phase,
            self._step,
            self._arrived,
            round(idle, 1),
            self._in_hand(idle / 2),
        )
        part = self._folder / f"rank-{self._rank:05d}.hang"
        temporary = part.with_suffix(".hang.tmp")
        temporary.write_text(json.dumps(asdict(sign)), encoding="utf-8")
        temporary.replace(part)
        recorder = threading.Thread(
            target=dump_flight_recorder, args=(self._folder / f"rank-{self._rank:05d}.nccl",), daemon=True
        )
        recorder.start()  # by itself: NCCL may be what hangs
        try:
            asked.touch(exist_ok=False)
        except FileExistsError:  # another rank will tell, and its end ends this one
            time.sleep(6 * GATHER)
            return
        deadline = time.monotonic() + GATHER
        while time.monotonic() < deadline and len(list(self._folder.glob("rank-*.hang"))) < len(self._nodes):
            time.sleep(0.1)
        signs = [
            Sign(**json.loads(file.read_text(encoding="utf-8")))
            for file in sorted(self._folder.glob("rank-*.hang"))
        ]
        hang = explain(signs, self._nodes)
        print(
            f"hang: {hang.words}\n"
            + "\n".join(map(str, signs))
            + f"\nall stacks: {self._folder}/rank-*.stacks",
            file=sys.stderr,
            flush=True,
        )
        self._report(hang)


def explain(signs: Sequence[Sign], nodes: Sequence[str]) -> Hang:
    """Who holds the others up, by what each rank says of itself; those that say nothing come first. nodes:
    that of each rank."""
    ranks = len(nodes)
    answered = {sign.rank: sign for sign in signs}
    silent = [rank for rank in range(ranks) if rank not in answered]
    longest = max(sign.seconds for sign in signs)
    if silent:
        known = "; the others: " + _phases(signs)
        return Hang(
            f"{_names(silent)} gave no sign of life for {longest:.0f} s, not even of the watchdog{known}",
            _common(nodes, silent),
            silent,
        )
    late = [sign for sign in signs if not sign.arrived] or list(signs)
    first = min(sign.step for sign in late)
    late = [sign for sign in late if sign.step == first]
    if len(late) == ranks:
        return Hang(f"all ranks are stuck for {longest:.0f} s: {_phases(signs)}", "", [])
    suspects = [sign.rank for sign in late]
    return Hang(
        f"{_phases(late)} for {longest:.0f} s, while the others wait", _common(nodes, suspects), suspects
    )


def _common(nodes: Sequence[str], ranks: Sequence[int]) -> str:
    """The node of some ranks, if it is one."""
    found = {nodes[rank] for rank in ranks}
    return found.pop() if len(found) == 1 else ""


def _phases(signs: Sequence[Sign]) -> str:
    groups: dict[str, list[Sign]] = {}
    for sign in signs:
        groups.setdefault(
            f"{sign.phase}, step {sign.step}" + ", waiting for the others" * sign.arrived, []
        ).append(sign)
    parts = []
    for what, group in groups.items():
        in_hand = next((f" (in hand: {sign.in_hand})" for sign in group if sign.in_hand), "")
        parts.append(
            f"{_names([sign.rank for sign in group])} on {', '.join(sorted({sign.node for sign in group}))}:"
            f" {what}{in_hand}"
        )
    return "; ".join(parts)


def _names(ranks: Sequence[int]) -> str:
    few = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {few}"


def dump_flight_recorder(file: Path) -> None:
    """Write NCCL's flight recorder (the collectives of late, for torch's analysis tools), where there is
    one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return
    with contextlib.suppress(Exception):  # NCCL may be what hangs
        file.write_bytes(torch._C._distributed_c10d._dump_nccl_trace())
