"""Which attempt may write a run's checkpoints: one file per attempt, created exclusively.

The attempt's number is the fencing token: the file with the highest number has the run. To take a run,

    1. create the file of the next number, exclusively; if it is there, look again for the next number;
    2. look whether a higher number has come meanwhile: then delete the own file, and begin anew;
    3. delete all files of lower numbers.

An earlier attempt that lives on finds its file gone, or a later one there, and leaves. Exclusive creation and
deletion work on network file systems, where locks often do not. As everybody creates before looking, no two
can both find that they have the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.disk import naming
from configs.errors import ConfigError, EarwitnessError
from configs.run.causes import Cause
from configs.run.folder import RunDir

HEARTBEAT = 5.0
"""Seconds between two signs of life."""
EXPIRES = 60.0
"""Seconds without one after which an attempt counts as dead."""


class Superseded(EarwitnessError):
    """A later attempt has taken over the run; this one leaves without saving."""

    cause = Cause.SUPERSEDED


@dataclass(frozen=True)
class Holder:
    """Who holds a run. pid: 0 for a job, which only signs of life tell of; system: the kernel and the process
    namespace in which `pid` means something; seconds: since the last sign of life."""

    attempt: int
    job: str
    host: str
    pid: int
    system: str
    seconds: float = 0.0

    @property
    def alive(self) -> bool:
        """Whether it may still be at work."""
        dead = self.pid and self.system == _system() and not Path(f"/proc/{self.pid}").exists()
        return not dead and self.seconds < EXPIRES


class Lease:
    """The right of an attempt to write, which lasts as long as its file does."""

    def __init__(self, run: RunDir, attempt: int) -> None:
        self.attempt = attempt
        self.lost = False
        """Whether a later attempt has been seen."""
        self._run, self._file = run, _file(run, attempt)
        self._released = threading.Event()

    def keep(self) -> Lease:
        """Give signs of life from now on, from a thread of this process."""
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return self

    def check(self) -> None:
        """Give a sign of life. Raises Superseded if a later attempt has taken over."""
        if self.superseded(sign=True):
            later = holder(self._run)
            by = f"attempt {later.attempt} ({_place(later)})" if later else "a later attempt"
            raise Superseded(
                f"{self._run.path}: {by} has taken over this run; attempt {self.attempt} leaves without"
                " saving"
            )

    def superseded(self, *, sign: bool = False) -> bool:
        """Whether a later attempt has taken over; with `sign` a sign of life is given."""
        try:
            os.utime(self._file) if sign else self._file.stat()
            self.lost = self.lost or any(file > self._file for file in _files(self._run))
        except FileNotFoundError:
            self.lost = True
        return self.lost

    def release(self) -> None:
        """Let the next attempt start at once."""
        self._released.set()
        self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self.lost and not self._released.wait(HEARTBEAT):
            with contextlib.suppress(
                Superseded, OSError
            ):  # a file system that does not answer for a while: try again
                self.check()


def claim(run: RunDir, *, job: str = "", supersede: bool = False) -> Lease:
    """Take a run for its next attempt, that of a Slurm job or of this process. With `supersede` also from a
    live one, as the next job of a chain does.

    Raises ConfigError if another attempt is at work.
    """
    while True:
        now = holder(run)
        if now and now.alive and not supersede:
            raise ConfigError(
                f"{run.path}: attempt {now.attempt} is at work here ({_place(now)}), and gave a sign of life"
                f" {now.seconds:.0f} s ago. Stop it there first; if it is dead, start again in"
                f" {max(1, EXPIRES - now.seconds):.0f} s. A second run needs another run.name."
            )
        attempt = max(run.ledger.read().next_attempt, now.attempt + 1 if now else 0)
        mine = Holder(attempt, job, socket.gethostname(), 0 if job else os.getpid(), _system())
        _file(run, attempt).parent.mkdir(parents=True, exist_ok=True)
        if not _create(_file(run, attempt), json.dumps(asdict(mine))):
            continue
        if (
            any(file > _file(run, attempt) for file in _files(run))
            or run.ledger.read().next_attempt > attempt
        ):
            _file(run, attempt).unlink(missing_ok=True)
            continue
        for file in _files(run):
            if file < _file(run, attempt):
                file.unlink(missing_ok=True)
        return Lease(run, attempt)


def holder(run: RunDir) -> Holder | None:
    """Who holds a run, dead or alive; None if nobody does."""
    while files := _files(run):
        with contextlib.suppress(FileNotFoundError):  # it has just been taken over, or left: look again
            seconds = max(0.0, _now(run) - files[-1].stat().st_mtime)
            try:
                return Holder(**{**json.loads(files[-1].read_text(encoding="utf-8")), "seconds": seconds})
            except (
                ValueError,
                TypeError,
            ):  # damaged, as by a full disk; signs of life are given all the same
                return Holder(int(files[-1].stem.removeprefix("attempt-")), "", "unknown", 0, "", seconds)
    return None


def _create(file: Path, text: str) -> bool:
    """Create a file; False if it is there. Raises OSError."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        with naming(file), os.fdopen(descriptor, "w", encoding="utf-8") as content:
            content.write(text)
            content.flush()
            os.fsync(descriptor)
    except OSError:
        file.unlink()  # it would hold the run until it expires
        raise
    return True


def file_system_time(folder: Path) -> float:
    """Seconds since the epoch by the clock of a folder's file system, which stamps the signs of life. Raises
    OSError."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        os.utime(probe.fileno())
        return os.fstat(probe.fileno()).st_mtime


def _now(run: RunDir) -> float:
    try:
        return file_system_time(run.leases)
    except OSError:
        return time.time()


def _files(run: RunDir) -> list[Path]:
    return sorted(run.leases.glob("attempt-*.json"))


def _file(run: RunDir, attempt: int) -> Path:
    return run.leases / f"attempt-{attempt:06d}.json"


def _place(holder: Holder) -> str:
    return f"host {holder.host}, " + (f"job {holder.job}" if holder.job else f"process {holder.pid}")


def _system() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip() + str(
        Path("/proc/self/ns/pid").readlink()
    )
