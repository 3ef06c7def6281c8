"""What a rank says of its failure where the ledger cannot be written: a full disk takes no log either."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import BinaryIO

from configs.run.events import Event, RankFailed, parse
from configs.run.folder import RunDir
from slurm.job import in_job

VARIABLE = "EARWITNESS_LAST_WORDS"
"""Tells a rank the descriptor that its launcher will read."""


@dataclass(frozen=True)
class LastWords:
    """Memory that the ranks of this machine share with their launcher."""

    memory: BinaryIO

    @classmethod
    def listen(cls) -> LastWords:
        """Of a launcher."""
        return cls(os.fdopen(os.memfd_create("last words"), "rb"))

    @property
    def descriptor(self) -> int:
        """What a rank writes into, which must be passed to it."""
        return self.memory.fileno()

    @property
    def environment(self) -> dict[str, str]:
        """Tells a rank the descriptor."""
        return {VARIABLE: str(self.descriptor)}

    def read(self) -> list[Event]:
        """All that was said."""
        self.memory.seek(0)
        return [parse(json.loads(line)) for line in self.memory]


def speak(run: RunDir, failed: RankFailed) -> None:
    """Tell the launcher of a failure; in a job, the job's log, if that can be written. Raises OSError."""
    if VARIABLE in os.environ:
        # Ranks share the position in it, too.
        os.write(int(os.environ[VARIABLE]), f"{json.dumps(failed.as_json())}\n".encode())
    elif in_job():
        log = run.slurm / f"{os.environ['SLURM_JOB_ID']}.log"
        with log.open("a", encoding="utf-8") as file:
            file.write(f"rank {failed.rank} on {failed.node}: {failed.message}\n")
