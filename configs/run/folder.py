"""The folder of a run: where everything lies that it leaves behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

from configs.disk import words_of_disk
from configs.errors import ConfigError, EarwitnessError
from configs.load import load_kept
from configs.run.files import JsonLines
from configs.run.ledger import Ledger
from configs.run.profiles import Profiles
from configs.run.proposal import Proposal
from configs.run.quarantine import Quarantine
from configs.schema import RunConfig

PACKAGES = ("configs", "data", "trainer", "slurm", "launch", "tools")
"""What a run's jobs need of a checkout."""


class RunDir:
    """`runs/NAME/`: paths, and what is kept in them."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        """The resolved config, without secrets."""
        self.proposal = Proposal(self.path / "config.next.yaml", self.config)
        """What a start asks for; it becomes config.yaml when the run has accepted it."""
        self.base = self.path / "base"
        """The model's config, tokenizer, processor, generation config and the tensors that are not
        trained."""
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.trackers = self.path / "trackers"
        """What other trackers were told (trainer/courier.py)."""
        self.ledger = Ledger(self.path / "events")
        """What happened."""
        self.quarantine = Quarantine(self.path / "quarantine")
        """The samples that could not be used."""
        self.audit = JsonLines(self.path / "audit")
        """With `data.audit`: the samples of every step and rank."""
        self.evaluations = self.path / "evaluations"
        """What the model said of clips at each evaluation (configs/run/predictions.py)."""
        self.logs = self.path / "logs"
        self.profiles = Profiles(self.path / "profile")
        """Traces of steps that somebody asked for (`launch profile`)."""
        self.leases = self.path / "leases"
        """Who is at work on the run (configs/run/lease.py)."""
        self.code = self.path / "code"
        """The code that its jobs run."""
        self.slurm = self.path / "slurm"
        """The script of its jobs, what they printed (JOB.log), and how they ended (jobs/JOB)."""

    @classmethod
    def create(cls, config: RunConfig) -> RunDir:
        """Make the folder of a run, or take it up again. Raises ConfigError if it cannot be made,
        EarwitnessError if it was there and cannot be written."""
        run = cls(config.run.dir)
        kind = EarwitnessError if run.exists else ConfigError
        try:
            for folder in (run.checkpoints, run.leases, run.ledger.folder, run.quarantine.folder):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except OSError as error:
            raise kind(
                f"{run.path}: cannot write the run's folder: {words_of_disk(error)}; or set run.dir to a"
                " place that you may write"
            ) from None
        return run

    @property
    def exists(self) -> bool:
        """Whether a run was ever started or submitted here."""
        return self.ledger.folder.is_dir() or self.slurm.is_dir() or self.config.is_file()

    @property
    def has_checkpoint(self) -> bool:
        """Whether a start goes on from a checkpoint of its own, as far as names of files say."""
        return any(self.checkpoints.glob("*"))

    def fetched(self, model: str) -> Path:
        """The folder of a model that came from the hub when the run was submitted: compute nodes need no
        network."""
        return self.path / "pretrained" / model.replace("/", "--")

    def attempt_logs(self, attempt: int) -> Path:
        """The folder of what the ranks of an attempt leave (see `rank_file`)."""
        return self.logs / f"attempt-{attempt:06d}"

    def rank_file(self, attempt: int, rank: int, ending: str) -> Path:
        """A file that a rank of an attempt leaves. ending: `log` (what it printed), `fatal` (the trace of a
        crash in native code), `inhand` (what it was decoding then), `alive` (touched in a
        long phase), `stacks`, `hang`, `nccl` (of a hang)."""
        return self.attempt_logs(attempt) / f"rank-{rank:05d}.{ending}"

    def read_config(self) -> RunConfig:
        """The resolved config of this run. Raises ConfigError if this folder is none."""
        if not self.config.is_file():
            raise ConfigError(
                f"{self.path}: not the folder of a run that has started (it has no config.yaml)"
            )
        return load_kept(self.config)
