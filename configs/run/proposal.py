"""The config that a start asks for, until the run has accepted it.

propose    `launch train` and `launch submit`, before the first rank starts     config.next.yaml
read       everybody who works for the attempt
accept     rank 0, when the model is loaded and the checkpoint was compared      -> config.yaml
withdraw   whoever started the attempt, when it is over: a config that was refused must not reach the next
"""

from __future__ import annotations

from pathlib import Path

from configs.load import dump, load, load_kept
from configs.run.files import write_atomic
from configs.schema import RunConfig


class Proposal:
    """`config.next.yaml` of a run, beside the config that it goes by."""

    def __init__(self, path: Path, accepted: Path) -> None:
        self.path = path
        self._accepted = accepted

    def propose(self, config: RunConfig) -> None:
        """Ask for a config."""
        write_atomic(self.path, dump(config))

    def read(self) -> RunConfig:
        """The config that is asked for; the run's own, if none is. Raises ConfigError if there is neither."""
        return load(self.path) if self.path.is_file() else load_kept(self._accepted)

    def accept(self) -> None:
        """Go on with what is asked for."""
        if self.path.is_file():
            self.path.replace(self._accepted)

    def withdraw(self) -> None:
        """Forget what was asked for and not accepted."""
        self.path.unlink(missing_ok=True)
