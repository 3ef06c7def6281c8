"""Traces of some steps of a run at work: asked for by one process, written by a rank of the run."""

from __future__ import annotations

from pathlib import Path


class Profiles:
    """`profile/` of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ask(self, rank: int) -> None:
        """Ask a rank for a trace of its next steps."""
        self.folder.mkdir(exist_ok=True)
        self._request(rank).touch()

    def is_asked_for(self, rank: int) -> bool:
        """Whether somebody asks this rank for a trace."""
        return self._request(rank).exists()

    def withdraw(self, rank: int) -> None:
        """Nobody asks this rank any more: it has answered, or somebody is tired of waiting."""
        self._request(rank).unlink(missing_ok=True)

    def trace(self, rank: int, step: int) -> Path:
        """The trace of the steps up to `step` on a rank, for Perfetto."""
        return self.folder / f"step-{step:08d}-rank-{rank}.json.gz"

    def traces(self, rank: int) -> set[Path]:
        """Those that are complete."""
        return {table.with_suffix(".json.gz") for table in self.folder.glob(f"step-*-rank-{rank}.txt")}

    def table(self, trace: Path) -> Path:
        """What took longest in a trace, as text; written last."""
        return trace.with_suffix("").with_suffix(".txt")

    def _request(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.wanted"
