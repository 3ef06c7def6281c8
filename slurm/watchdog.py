"""Turns a hang into a report and an exit. Every rank has a watchdog, which is given a sign of life in every
phase.

Whichever notices first asks the others, through a file in the attempt's log folder, what they are doing;
ranks that do not even answer are the first suspects, then those that have not arrived where the others wait.
Those that have arrived are patient as long as another rank tells that it goes on, as with slow storage.
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

from configs.run.files import write_atomic
from configs.run.goodput import Phase
from configs.run.lease import file_system_time

FIRST_LIMIT = 1800.0
"""Seconds that a phase may last of which nothing is known."""
SLOW_PHASES = (Phase.START_UP, Phase.SAVING)
"""Phases that may last as long as that at any time: a disk may be slow."""
LEAST_LIMIT = 120.0
"""Seconds that any phase may last."""
FACTOR = 20
"""How many times the longest that a phase took so far it may last."""
TICK = 1.0
"""Seconds between two looks."""
GATHER = 10.0
"""Seconds in which the others can say what they are doing."""
QUIET = 5.0
"""Seconds without a sign of life after which a rank looks whether another one has noticed a hang."""
ALIVE_EVERY = 30.0
"""Seconds after which a rank that goes on in one phase, as in a long wait for data, tells the others so."""
HUNG = 70
"""Exit code of a rank that hangs."""
RANKS_SHOWN = 8


@dataclass(frozen=True)
class Sign:
    """What a rank was doing. phase: as Phase calls it; arrived: whether it waits for the others at an
    agreement; seconds: since its last sign of life; in_hand: a sample that it decodes."""

    rank: int
    node: str
    phase: str
    step: int
    arrived: bool
    seconds: float
    in_hand: str = ""

    @property
    def doing(self) -> str:
        """As `training, step 7`."""
        phase = self.phase.replace("_", " ")
        waiting = ", waiting for the others" if self.arrived else ""
        return f"{phase}, step {self.step}{waiting}"


@dataclass(frozen=True)
class Hang:
    """A hang in words, the ranks that hold the others up, and the node that seems to be at fault (empty if
    none does)."""

    words: str
    node: str
    suspects: list[int]


class Watchdog:
    """Watches one rank. Signs of life are `watch(phase, step)` and `watch.arrive()`."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        nodes: Sequence[str],
        *,
        seconds: float | None = None,
        in_hand: Callable[[float], str] = lambda seconds: "",
        report: Callable[[Hang], None],
        orphaned: Callable[[], bool] = lambda: False,
    ) -> None:
        """folder: where all ranks of the attempt write their reports; nodes: that of each rank; seconds: how
        long a known phase may last (`slurm.hang_seconds`); in_hand: names what has been in hand for longer
        than that many seconds; report: is told of a hang, on one rank; orphaned: whether a later attempt has
        taken over."""
        self._folder, self._rank, self._nodes, self._seconds = folder, rank, nodes, seconds
        self._in_hand, self._report, self._orphaned = in_hand, report, orphaned
        self._phase, self._step, self._arrived = Phase.START_UP, 0, False
        self._last_sign, self._armed = time.monotonic(), 0.0
        self._phase_began = self._told_alive = time.monotonic()
        self._longest: dict[tuple[Phase, bool], float] = {}
        """Seconds between two signs of life at most, by phase and whether the rank had arrived."""
        self._asked = folder / "hang"
        """Whoever notices a hang first makes this file."""
        self._closed = threading.Event()
        self._stacks = self._file(rank, "stacks").open("w", encoding="utf-8")
        self._arm()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def __call__(self, phase: Phase, step: int) -> None:
        """This rank enters a phase, or goes on in it."""
        self._sign(phase, step, arrived=False)

    def arrive(self) -> None:
        """This rank waits for the others."""
        self._sign(self._phase, self._step, arrived=True)

    @property
    def limit(self) -> float:
        """Seconds that the present phase may last without a sign of life."""
        longest = self._longest.get((self._phase, self._arrived))
        if longest is None or self._phase in SLOW_PHASES:
            return FIRST_LIMIT
        if self._seconds is not None:
            return self._seconds
        return max(LEAST_LIMIT, 3 * longest, min(FACTOR * longest, FIRST_LIMIT))

    def close(self) -> None:
        """End the watch: what comes now may take its time."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        Path(self._stacks.name).unlink(missing_ok=True)

    def _sign(self, phase: Phase, step: int, arrived: bool) -> None:
        now = time.monotonic()
        before = (self._phase, self._arrived)
        self._longest[before] = max(self._longest.get(before, 0.0), now - self._last_sign)
        self._last_sign, self._phase, self._step, self._arrived = now, phase, step, arrived
        if (phase, arrived) != before:
            self._phase_began = now
        if (phase, arrived) != before or now - self._armed > QUIET:
            self._arm()

    def _arm(self) -> None:
        self._armed = time.monotonic()
        faulthandler.dump_traceback_later(self.limit + 3 * GATHER, exit=True, file=self._stacks)

    def _watch(self) -> None:
        """Look again and again, in a thread of its own; ends the process if there is a hang."""
        looked_for_successor = 0.0
        while not self._closed.wait(TICK):
            now = time.monotonic()
            idle = now - self._last_sign
            if idle > QUIET + GATHER and now - looked_for_successor > GATHER:
                looked_for_successor = now
                with contextlib.suppress(OSError):  # a file system that does not answer
                    self._leave_if_orphaned()
            if idle < QUIET and now - max(self._phase_began, self._told_alive) > ALIVE_EVERY:
                self._told_alive = now
                with contextlib.suppress(OSError):
                    self._file(self._rank, "alive").touch()
            another_hangs = idle > QUIET and self._asked.exists()
            if idle > self.limit and self._arrived and not another_hangs and self._another_goes_on():
                self._arm()
            elif idle > self.limit or another_hangs:
                try:
                    self._hang(idle)
                finally:  # whatever cannot be written
                    os._exit(HUNG)

    def _another_goes_on(self) -> bool:
        """Whether a rank has said of late that it goes on in a long phase, as one that reads slowly
        does: this one waits for it, and neither hangs."""
        try:
            said = max((file.stat().st_mtime for file in self._folder.glob("rank-*.alive")), default=0.0)
            return file_system_time(self._folder) - said < 3 * ALIVE_EVERY
        except OSError:
            return False

    def _leave_if_orphaned(self) -> None:
        if self._orphaned():
            print(
                "a later attempt has taken over this run, and this rank is stuck: it leaves",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

    def _hang(self, idle: float) -> None:
        """Say what this rank is doing; whoever is the first to, reports the hang.

        idle: seconds since the last sign of life.
        """
        self._dump_stacks()
        self._write_sign(idle)
        recorder = threading.Thread(
            target=dump_flight_recorder, args=(self._file(self._rank, "nccl"),), daemon=True
        )
        recorder.start()  # by itself: NCCL may be what hangs
        try:
            self._asked.touch(exist_ok=False)
        except FileExistsError:  # another rank will tell, and its end ends this one
            time.sleep(6 * GATHER)
            return
        signs = self._gather_signs()
        hang = explain(signs, self._nodes)
        lines = [f"hang: {hang.words}", *map(str, signs), f"all stacks: {self._folder}/rank-*.stacks"]
        print("\n".join(lines), file=sys.stderr, flush=True)
        self._report(hang)

    def _dump_stacks(self) -> None:
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(self._stacks, all_threads=True)
            self._stacks.flush()

    def _write_sign(self, idle: float) -> None:
        sign = Sign(
            rank=self._rank,
            node=self._nodes[self._rank],
            phase=self._phase.value,
            step=self._step,
            arrived=self._arrived,
            seconds=round(idle, 1),
            in_hand=self._in_hand(idle / 2),
        )
        write_atomic(self._file(self._rank, "hang"), json.dumps(asdict(sign)))

    def _gather_signs(self) -> list[Sign]:
        """What the ranks say that answer in time."""
        deadline = time.monotonic() + GATHER
        while time.monotonic() < deadline and len(self._sign_files()) < len(self._nodes):
            time.sleep(0.1)
        return [Sign(**json.loads(file.read_text(encoding="utf-8"))) for file in self._sign_files()]

    def _sign_files(self) -> list[Path]:
        return sorted(self._folder.glob("rank-*.hang"))

    def _file(self, rank: int, ending: str) -> Path:
        return self._folder / f"rank-{rank:05d}.{ending}"


def explain(signs: Sequence[Sign], nodes: Sequence[str]) -> Hang:
    """Who holds the others up, by what each rank says of itself; those that say nothing come first. nodes:
    that of each rank."""
    seconds = max(sign.seconds for sign in signs)
    answered = {sign.rank for sign in signs}
    silent = [rank for rank in range(len(nodes)) if rank not in answered]
    if silent:
        words = (
            f"{_ranks(silent)} gave no sign of life for {seconds:.0f} s, not even of the watchdog;"
            f" the others: {_doings(signs)}"
        )
        return Hang(words, _common_node(silent, nodes), silent)
    behind = _furthest_behind(signs)
    if len(behind) == len(nodes):
        return Hang(f"all ranks are stuck for {seconds:.0f} s: {_doings(signs)}", "", [])
    suspects = [sign.rank for sign in behind]
    words = f"{_doings(behind)} for {seconds:.0f} s, while the others wait"
    return Hang(words, _common_node(suspects, nodes), suspects)


def _furthest_behind(signs: Sequence[Sign]) -> list[Sign]:
    """Of the ranks that have not arrived (of all, if all have), those at the lowest step."""
    under_way = [sign for sign in signs if not sign.arrived] or list(signs)
    step = min(sign.step for sign in under_way)
    return [sign for sign in under_way if sign.step == step]


def _common_node(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    """The node of some ranks; empty if they have several."""
    their_nodes = {nodes[rank] for rank in ranks}
    return their_nodes.pop() if len(their_nodes) == 1 else ""


def _doings(signs: Sequence[Sign]) -> str:
    """What each rank does, those together that do the same."""
    groups: dict[str, list[Sign]] = {}
    for sign in signs:
        groups.setdefault(sign.doing, []).append(sign)
    return "; ".join(_in_words(group) for group in groups.values())


def _in_words(group: Sequence[Sign]) -> str:
    """Ranks that do the same, as `ranks 2, 3 on n2: training, step 7 (in hand: SAMPLE)`."""
    nodes = ", ".join(sorted({sign.node for sign in group}))
    samples = [sign.in_hand for sign in group if sign.in_hand]
    in_hand = f" (in hand: {samples[0]})" if samples else ""
    return f"{_ranks([sign.rank for sign in group])} on {nodes}: {group[0].doing}{in_hand}"


def _ranks(ranks: Sequence[int]) -> str:
    """As `rank 3`, or `ranks 3, 4`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = ", ..." if len(ranks) > RANKS_SHOWN else ""
    return f"ranks {', '.join(map(str, ranks[:RANKS_SHOWN]))}{more}"


def dump_flight_recorder(file: Path) -> None:
    """Write NCCL's flight recorder (the collectives of late, for torch's analysis tools), where there is
    one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return
    with contextlib.suppress(Exception):  # NCCL may be what hangs
        file.write_bytes(torch._C._distributed_c10d._dump_nccl_trace())
