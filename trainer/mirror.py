"""Copies of complete checkpoints outside the run's folder, at any URL that fsspec opens. Rank 0 makes them in
the background.

URL/NAME/ looks like the run's folder: base/, config.yaml, checkpoints/step-N/ with manifest.json written last
and deleted first.
"""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from configs.errors import CheckpointError, ConfigError, DataError, ShardError
from configs.run.events import Damaged, Mirrored, MirrorFailed, Restored
from configs.run.folder import RunDir
from configs.run.lease import Lease, Superseded
from configs.schema import RunConfig
from data.location import Location
from data.retry import Trouble
from data.upload import download, upload
from trainer import checkpoint
from trainer.checkpoint import MANIFEST, NAME, Manifest, Reader

T = TypeVar("T")


class Mirror:
    """The copies of one run's checkpoints."""

    def __init__(self, run: RunDir, config: RunConfig, lease: Lease) -> None:
        """lease: the right of this attempt to write, which copies and deletes only as long as it lasts."""
        self.url = f"{(config.checkpoint.mirror or '').rstrip('/')}/{config.run.name}"
        self._run, self._settings, self._metric = run, config.checkpoint, config.evaluate.best_metric
        self._fence, self._attempt = lease.check, lease.attempt
        self._begun_at: int | None = None
        self.copying: Path | None = None
        """What must not be deleted now."""
        # The newest first: while it is copied, others may become superfluous.
        self._waiting: queue.LifoQueue[Path] = queue.LifoQueue()
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def begin(self, step: int) -> None:
        """This attempt goes on from a step: copies of later ones, of a course that was given up, are deleted
        before the first new one."""
        self._begun_at = step

    def upload(self, folder: Path) -> None:
        """Copy a checkpoint in the background."""
        self._waiting.put(folder)

    def finish(self) -> None:
        """Wait until all that was asked for is copied, or has failed."""
        self._waiting.join()

    def restore(self) -> None:
        """Bring the newest sound checkpoint, the best one and base/ into a run's folder that has none;
        nothing if the mirror has none either.

        Raises DataError if the mirror may not be read, CheckpointError if it cannot be now, or if all that it
        holds is damaged: the run must not start from nothing then.
        """
        try:
            names = self._names()
            newest = next((name for name in names if self._bring_back(name)), None)
            best = checkpoint.best(self._manifests(names), self._metric)
            if newest and best and best < newest:
                self._bring_back(best)
        except (DataError, ShardError, OSError) as error:
            said = str(error).rstrip(".")
            failure = DataError if isinstance(error, DataError) else CheckpointError
            raise failure(
                f"{self.url}: {self._run.path} has no checkpoint, and this mirror of it cannot be read:"
                f" {said}. Mend the access, or leave checkpoint.mirror out (checkpoint.mirror=null) to start"
                " from the beginning."
            ) from error
        if names and not newest:
            raise CheckpointError(
                f"{self.url}: {self._run.path} has no checkpoint, and every copy there is damaged"
                f" ({', '.join(names)}). Put back a sound one, or leave checkpoint.mirror out"
                " (checkpoint.mirror=null) to start from the beginning."
            )

    def _bring_back(self, name: str) -> bool:
        """Whether a copy is sound; it is then in the run's folder."""
        folder = self._run.checkpoints / name
        temporary = folder.with_suffix(".mirror.tmp")
        self._get(f"checkpoints/{name}", temporary)
        if problem := _damage(temporary):
            print(f"{self.url}/checkpoints/{name}: {problem}; trying the one before", flush=True)
            self._run.ledger.record(
                Damaged(attempt=self._attempt, folder=f"{self.url}/checkpoints/{name}", message=problem)
            )
            shutil.rmtree(temporary)
            return False
        if not (self._run.base / "config.json").is_file():
            self._get("base", self._run.base)
        temporary.rename(folder)
        print(f"{self._run.path}: had no checkpoint; {name} was brought back from {self.url}", flush=True)
        self._run.ledger.record(Restored(attempt=self._attempt, folder=name, mirror=self.url))
        return True

    def _work(self) -> None:
        while True:
            folder = self.copying = self._waiting.get()
            try:
                if folder.is_dir():
                    self._copy(folder)
            except Superseded:
                pass  # the loop says so
            except Exception as error:  # whatever it is, training goes on
                if folder.is_dir():  # else newer ones have made it superfluous in the meantime
                    said = (str(error) or type(error).__name__).rstrip(".")
                    print(
                        f"{self.url}: {folder.name} could not be copied: {said}. Training goes on; the next"
                        " checkpoint is tried again.",
                        flush=True,
                    )
                    with contextlib.suppress(OSError):
                        self._run.ledger.record(
                            MirrorFailed(
                                attempt=self._attempt, folder=folder.name, mirror=self.url, message=said
                            )
                        )
            finally:
                self.copying = None
                self._waiting.task_done()

    def _copy(self, folder: Path) -> None:
        began = time.perf_counter()
        self._fence()
        if self._begun_at is not None:
            self._begin(self._begun_at)
            self._begun_at = None
        names, manifest = self._names(), folder / MANIFEST
        if folder.name in names:
            there, here = self._manifests([folder.name]).get(folder.name), Reader(folder).manifest
            if there == here:
                return
            if there and replace(there, metrics={}) == replace(here, metrics={}):
                self._put(manifest, f"checkpoints/{folder.name}/{MANIFEST}")  # it was evaluated since
                return
        self._remove(folder.name)  # what a broken copy has left, perhaps of another number of ranks
        files = sorted(folder.iterdir(), key=lambda file: file.name == MANIFEST)
        size = sum(file.stat().st_size for file in files)
        for file in files:
            self._put(file, f"checkpoints/{folder.name}/{file.name}")
        self._run.ledger.record(
            Mirrored(
                attempt=self._attempt,
                folder=folder.name,
                mirror=self.url,
                seconds=round(time.perf_counter() - began, 3),
                bytes=size,
            )
        )
        self._retain({*names, folder.name})

    def _begin(self, step: int) -> None:
        """Delete the copies of checkpoints after a step, damaged ones among them, and copy what the others
        need besides."""
        for name in self._names():
            if name > checkpoint.name_of(step):
                self._remove(name)
        for file in sorted(self._run.base.iterdir(), key=lambda file: file.name == "config.json"):
            self._put(file, f"base/{file.name}")
        self._put(self._run.config, "config.yaml")

    def _retain(self, names: set[str]) -> None:
        """Keep the complete copies that the run's own folder would keep, and delete all else."""
        self._fence()
        manifests = self._manifests(names)
        kept = names - set(checkpoint.superfluous(manifests, self._settings, self._metric))
        for name in self._list("checkpoints"):
            if name not in kept:
                self._remove(name)

    def _manifests(self, names: Iterable[str]) -> dict[str, Manifest]:
        """Manifests of those copies where it can be read: others are damaged, or of another version."""
        manifests = {}
        for name in names:
            path = f"checkpoints/{name}/{MANIFEST}"
            content = self._try("read it", path, lambda filesystem, path: filesystem.cat_file(path))
            with contextlib.suppress(ValueError, TypeError, KeyError):
                manifests[name] = Manifest.of(json.loads(content))
        return manifests

    def _remove(self, name: str) -> None:
        def remove(filesystem: Any, path: str) -> None:
            if filesystem.exists(path):
                filesystem.rm(path, recursive=True)

        for path in (f"checkpoints/{name}/{MANIFEST}", f"checkpoints/{name}"):
            self._try("delete it", path, remove)

    def _names(self) -> list[str]:
        """Complete checkpoints there, newest first."""
        # A glob would take brackets in the mirror's own name for a pattern.
        paths = self._try("read its list", "checkpoints", lambda filesystem, path: filesystem.find(path))
        names = [path.split("/")[-2] for path in paths if path.endswith(f"/{MANIFEST}")]
        return sorted((name for name in names if NAME.fullmatch(name)), reverse=True)

    def _list(self, folder: str) -> list[str]:
        """Names of what is in a folder there."""
        paths = self._try("read its list", folder, lambda filesystem, path: filesystem.ls(path, detail=False))
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def _try(self, what: str, name: str, action: Callable[[Any, str], T]) -> T:
        """What an action gives with the file system and a path there, which are asked anew, tried again, and
        with other keys where these have expired. what: in words, as `delete it`."""

        def asked_anew(filesystem: Any, path: str) -> T:
            filesystem.invalidate_cache()
            return action(filesystem, path)

        return Trouble(Location(f"{self.url}/{name}"), what).retry(asked_anew)

    def _put(self, file: Path, name: str) -> None:
        upload(file, Location(f"{self.url}/{name}"))

    def _get(self, name: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(self._list(name), key=lambda file: file == "config.json"):
            download(Location(f"{self.url}/{name}/{file}"), folder / file)


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint; empty if it is sound."""
    try:
        return next(iter(Reader(folder).verify()), "")
    except (CheckpointError, ConfigError) as error:
        return str(error)
