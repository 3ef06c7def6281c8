"""Checkpoints are written in the background. Training waits for the snapshot alone, a copy to host memory
that is allocated once, and only if the gradient of the next step is there sooner: weights and moments do not
change before the optimizer's step.

Order of events: snapshot -> every rank writes and syncs its file, then its done-file -> rank 0, when all of
those are there: manifest, fence, rename. Off the main thread ranks agree through these files and never by
collectives; on it, at the next step or in `finish`.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from xxhash import xxh3_128

from configs.disk import words_of_disk
from configs.errors import CheckpointError, PeerFailed
from configs.run.lease import Superseded
from trainer.checkpoint import (
    DIGEST_BLOCK,
    MANIFEST,
    Manifest,
    name_of,
    safetensors_header,
    sync,
    write_synced,
)
from trainer.distributed import World
from trainer.engines import KINDS, Engine, Fragment

POLL = 0.05
"""Seconds between looks for what other ranks have done."""
SYNC_BLOCKS = 16
"""Blocks of a file that are written before they must be on disk, so that the progress means something."""
REPLACE_BELOW = 0.5
"""Written share of a checkpoint under way below which an urgent save replaces it. Above, it is waited for:
that costs less than half a save, and should the time run out after all, that one is durable."""

PIECE_BYTES = 1 << 30
"""Host memory of a snapshot is taken in pieces of at most this size: pinned ones are rounded up to a power of
two, 9.7 GB in one piece to 16."""


@dataclass(frozen=True)
class Commit:
    """A checkpoint that is complete. Seconds: how long training stopped for it, and from there until it was
    durable."""

    folder: Path
    manifest: Manifest
    blocking_seconds: float
    total_seconds: float
    bytes: int


class Snapshot:
    """A rank's fragments in host memory, laid out as in the file: reused for every checkpoint, pinned where
    there is a GPU."""

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        self.entries = [[f.name, f.start, f.end] for f in fragments]
        # All weights, then all moments: an export reads a third of the file, and neighbours stay neighbours.
        shapes = {f"{f.name}:{kind}": [f.end - f.start] for kind in KINDS for f in fragments}
        self._header = safetensors_header(shapes, torch.float32)
        on_gpu = any(tensor.is_cuda for f in fragments for tensor in f.tensors.values())
        elements = len(KINDS) * sum(f.end - f.start for f in fragments)
        self._piece_elements = PIECE_BYTES // torch.float32.itemsize
        self._pieces = [
            torch.empty(min(self._piece_elements, elements - start), pin_memory=on_gpu)
            for start in range(0, elements, self._piece_elements)
        ]
        for piece in self._pieces:
            piece.fill_(0)  # so that no page is touched for the first time while training waits
        self._stream = torch.cuda.Stream() if on_gpu else None

    def take(self, fragments: Sequence[Fragment]) -> None:
        """Copy the state, off the main thread."""
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            position = 0
            for kind in KINDS:
                for fragment in fragments:
                    self._copy(fragment.tensors[kind], position)
                    position += fragment.end - fragment.start
            if self._stream:
                self._stream.synchronize()

    def _copy(self, source: torch.Tensor, position: int) -> None:
        """Begin to copy elements, (n,) float32, to a position among all elements."""
        while len(source):
            number, start = divmod(position, self._piece_elements)
            target = self._pieces[number][start : start + len(source)]
            target.copy_(source[: len(target)], non_blocking=True)
            source = source[len(target) :]
            position += len(target)

    def contents(self) -> list[memoryview]:
        """The bytes of the file, in order."""
        pieces = [piece.view(torch.uint8).numpy().data for piece in self._pieces]
        return [memoryview(self._header), *pieces]

    def follow(self) -> None:
        """On a GPU, let the next copy wait for all that has been asked of it up to now."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())


class Writer:
    """Writes the checkpoints of a run, one at a time. Every method but `failed`, `hold` and `drain` is called
    by all ranks at the same point."""

    def __init__(
        self,
        root: Path,
        attempt: int,
        engine: Engine,
        world: World,
        shapes: dict[str, list[int]],
        *,
        fence: Callable[[], None] = lambda: None,
        committed: Callable[[Commit], None] = lambda commit: None,
    ) -> None:
        """shapes: of all parameters, by name. On rank 0, in the background: `fence` raises if this attempt
        may not write any more, `committed` is told of each checkpoint that is complete.
        """
        self.root, self.attempt, self.world, self.shapes = root, attempt, world, shapes
        self.fence, self.committed = fence, committed
        self._engine, self._snapshot = engine, Snapshot(engine.fragments())
        self._job: _Job | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the checkpoint under way has failed; `finish` then says why."""
        return self._job is not None and self._job.error is not None

    def save(self, manifest: Manifest, *, urgent: bool = False) -> None:
        """Begin to save the state, which must not change before `hold` has returned.

        Waits for the one under way, or replaces it if this one is `urgent` and that has far to go. Raises as
        `finish` does, for the one under way.
        """
        began = time.perf_counter()
        if urgent and self._job:
            (written,) = self.world.sum([self._job.progress])
            if written < REPLACE_BELOW * self.world.size:
                self._abandon()
        self.finish()
        self._snapshot.follow()
        self._job = _Job(self, self._snapshot, self._engine.fragments(), manifest, began)

    def hold(self) -> None:
        """Wait for the snapshot, before the state changes."""
        job = self._job
        if job is not None and not job.taken.is_set():
            began = time.perf_counter()
            job.taken.wait()
            job.blocking += time.perf_counter() - began

    def finish(self) -> None:
        """Wait until the checkpoint under way is durable.

        If it could not be written (disk full, no permission), the rank that knows why raises CheckpointError,
        the others PeerFailed; earlier checkpoints stay as they are. If another attempt has taken over, rank 0
        raises Superseded.
        """
        job = self._job
        if job is None:
            return
        # All must have written before it makes sense to wait for rank 0.
        for part in (job.written, job.committed):
            # In short collectives: a disk may take longer than one may last.
            while self.world.any(not part.is_set()):
                if part.wait(POLL):
                    time.sleep(POLL / 5)
            if self.world.any(job.error is not None):
                self._fail(job)
            job.all_written.set()
        self._job = None

    def drain(self, seconds: float) -> None:
        """Give the checkpoint under way a last chance, before this rank leaves with an error and without the
        others."""
        if self._job is not None:
            self._job.thread.join(seconds)

    def _fail(self, job: _Job) -> None:
        """Give up the checkpoint under way, and raise why: that another attempt has taken over comes before
        what follows from it."""
        cause = job.error
        superseded: Superseded | None = None
        self._abandon()
        if self.world.rank == 0:
            try:
                self.fence()
            except Superseded as error:
                superseded = error
        if self.world.any(superseded is not None):
            raise superseded or PeerFailed("a later attempt has taken over")
        if cause is None:
            raise PeerFailed("another rank could not write the checkpoint")
        raise CheckpointError(
            f"{job.temporary}: cannot write the checkpoint of step {job.manifest.step}: "
            f"{words_of_disk(cause) or cause}. "
            "Earlier checkpoints are intact; make room or mend the folder, and start again."
        ) from cause

    def _abandon(self) -> None:
        """Give up the checkpoint under way; no trace of it is left."""
        assert self._job is not None
        self._job.abandoned.set()
        self._job.thread.join()
        self.world.barrier()
        if self.world.rank == 0:
            shutil.rmtree(self._job.temporary, ignore_errors=True)
        self._job = None


class _Job:
    """One checkpoint on its way, and the thread that writes it."""

    def __init__(
        self,
        writer: Writer,
        snapshot: Snapshot,
        fragments: Sequence[Fragment],
        manifest: Manifest,
        began: float,
    ) -> None:
        self.writer, self.snapshot, self.fragments = writer, snapshot, fragments
        self.manifest, self.began = manifest, began
        self.blocking = time.perf_counter() - began
        self.final = writer.root / name_of(manifest.step)
        self.temporary = writer.root / name_of(manifest.step, unfinished=writer.attempt)
        self.progress = 0.0
        """Share of this rank's file that is written."""
        self.error: Exception | None = None
        self.taken, self.written, self.committed = threading.Event(), threading.Event(), threading.Event()
        """That this rank has taken its snapshot, that it has written its file, and that rank 0 has given the
        folder its name; or failed."""
        self.abandoned, self.all_written = threading.Event(), threading.Event()
        """Set from outside."""
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        world = self.writer.world
        try:
            if world.device.type == "cuda":
                # A thread begins with GPU 0, where this rank would take up memory if it used it.
                torch.cuda.set_device(world.device)
            self.snapshot.take(self.fragments)
            self.taken.set()
            self._write()
            self.written.set()
            if world.rank == 0:
                self._commit()
        except Exception as error:
            self.error = error
        for event in (self.taken, self.written, self.committed):
            event.set()

    def _write(self) -> None:
        """Write this rank's file, and then its done-file, which says what is in it."""
        self.temporary.mkdir(parents=True, exist_ok=True)
        file = self.temporary / self._file_name(self.writer.world.rank)
        contents = self.snapshot.contents()
        size = sum(len(content) for content in contents)
        with file.open("wb", buffering=0) as out:
            digests = self._write_blocks(out, contents, size)
            os.fsync(out.fileno())
        done = {"file": {file.name: {"size": size, "xxh3_128": digests}}, "fragments": self.snapshot.entries}
        unfinished = file.with_suffix(".json.tmp")
        write_synced(unfinished, done)
        unfinished.replace(file.with_suffix(".json"))

    def _write_blocks(self, out: FileIO, contents: list[memoryview], size: int) -> list[str]:
        """Write contents of `size` bytes together; returns the digest of each block."""
        digests: list[str] = []
        digest, room = xxh3_128(), DIGEST_BLOCK
        for content in contents:
            while content:
                in_block = content[:room]
                self._write_all(out, in_block, size)
                digest.update(in_block)
                content = content[len(in_block) :]
                room -= len(in_block)
                if room == 0:
                    digests.append(digest.hexdigest())
                    digest, room = xxh3_128(), DIGEST_BLOCK
                    if len(digests) % SYNC_BLOCKS == 0:
                        os.fdatasync(out.fileno())
        if room < DIGEST_BLOCK:
            digests.append(digest.hexdigest())
        return digests

    def _write_all(self, out: FileIO, content: memoryview, size: int) -> None:
        """Write a part of a file of `size` bytes, unless the checkpoint is given up meanwhile."""
        while content:
            if self.abandoned.is_set():
                raise CheckpointError("given up for a newer one")
            count = out.write(content)
            content = content[count:]
            self.progress += count / size

    def _commit(self) -> None:
        """On rank 0, wait for all done-files, write the manifest, and give the folder its name."""
        done_files = [
            (self.temporary / self._file_name(rank)).with_suffix(".json")
            for rank in range(self.writer.world.size)
        ]
        self._await(done_files)
        for done_file in done_files:
            self._take_in(json.loads(done_file.read_text(encoding="utf-8")))
            done_file.unlink()
        write_synced(self.temporary / MANIFEST, asdict(self.manifest))
        sync(self.temporary)
        self.writer.fence()
        former = self.temporary.with_suffix(".former.tmp")
        if self.final.exists():
            self.final.rename(former)
        self.temporary.rename(self.final)
        sync(self.writer.root)
        shutil.rmtree(former, ignore_errors=True)
        self._tell()

    def _await(self, done_files: list[Path]) -> None:
        """Wait until all ranks have written, by their done-files or by what they agree on in `finish`: on NFS
        a listing may be old by half a minute, but a name that nobody has asked for yet is looked up anew."""
        while not self.all_written.is_set():
            if len(list(self.temporary.glob("rank-*.json"))) == len(done_files):
                return
            if self.abandoned.wait(POLL):
                raise CheckpointError("given up, or another rank failed")

    def _take_in(self, done: dict[str, Any]) -> None:
        """Add a rank's file to the manifest, and its fragments."""
        (file,) = done["file"]
        self.manifest.files |= done["file"]
        for name, start, end in done["fragments"]:
            unseen = {"shape": self.writer.shapes[name], "fragments": []}
            parameter = self.manifest.parameters.setdefault(name, unseen)
            parameter["fragments"].append([start, end, file])

    def _tell(self) -> None:
        """Tell of the checkpoint, which is durable whatever comes of that."""
        size = sum(file["size"] for file in self.manifest.files.values())
        total = time.perf_counter() - self.began
        try:
            self.writer.committed(Commit(self.final, self.manifest, self.blocking, total, size))
        except Exception as error:
            print(
                f"{self.final}: is complete, but what follows a save failed: {type(error).__name__}: {error}",
                flush=True,
            )

    def _file_name(self, rank: int) -> str:
        return f"rank-{rank:05d}-of-{self.writer.world.size:05d}.safetensors"
