"""The ranks of a benchmark: `python -m tools.bench.ranks WORK save ROUNDS METHOD...` and `... WORK load
METHOD`; rank 0 leaves found.json."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from configs.run.folder import RunDir
from configs.schema import RunConfig
from data.batch import Batch
from data.decode import SAMPLE_RATE
from trainer import checkpoint, distributed, model
from trainer.checkpoint import Manifest, Reader, sync
from trainer.distributed import World
from trainer.engines.zero2 import Zero2Engine
from trainer.loss import token_losses
from trainer.writer import Writer

SECONDS = 2
"""Audio window: short, so that a step of a large model takes about a second."""
TOKENS = 16
"""Of a caption."""
STEPS = 3
"""Undisturbed steps before each save; their median is what a step takes."""
Wait = Callable[[], object]


class Trainer:
    """Trains on noise, and saves in several ways: each begins a save, and returns what waits until it is
    durable."""

    def __init__(self, work: Path, world: World) -> None:
        self.work, self.world = work, world
        data, optim = {"sources": [{"name": "noise", "shards": "none"}]}, {"max_steps": 1}
        engine = {"dtype": "bf16" if distributed.has_bf16(world.device) else "fp32"}
        sections = {
            "run": {"name": "bench"},
            "model": {"name_or_path": str(work / "model")},
            "data": data,
            "optim": optim,
            "engine": engine,
        }
        config = RunConfig.model_validate(sections)
        captioner = model.load(config.model, seed=0)
        if world.rank == 0:
            model.save_base(RunDir(work / "earwitness"), captioner)
        self.shapes = {name: list(parameter.shape) for name, parameter in captioner.trained.items()}
        self.mels, self.parameters = captioner.config.num_mel_bins, captioner.model.num_parameters()
        self.engine = Zero2Engine(captioner.model, config, world)
        self._writer: Writer | None = None
        self.held = 0.0
        """Seconds that steps have waited for a snapshot."""
        self.durable: float | None = None
        """When the last save was seen on disk by a rank that can tell; None while it is under way."""

    def prepare_saving(self) -> dict[str, Callable[[int], Wait]]:
        """What each way of saving allocates once. Returns them by name."""
        self._writer = Writer(
            self.work / "earwitness/checkpoints",
            0,
            self.engine,
            self.world,
            self.shapes,
            committed=self._mark,
        )
        self._state = {
            f"{f.name}:{f.start}:{kind}": tensor
            for f in self.engine.fragments()
            for kind, tensor in f.tensors.items()
        }
        self._stager = DefaultStager(StagingOptions(*[False] * 4))
        self._group = dist.new_group(backend="gloo")
        return {"earwitness": self._save_earwitness, "deepspeed": self._save_deepspeed, "dcp": self._save_dcp}

    def step(self) -> float:
        """Take a step; returns its seconds."""
        began = time.perf_counter()
        waveforms, ids = (
            torch.randint(-3000, 3000, (1, SECONDS * SAMPLE_RATE), dtype=torch.int16),
            torch.randint(9, 99, (1, TOKENS)),
        )
        batch = Batch(
            waveforms, torch.tensor([SECONDS * SAMPLE_RATE]), ids, ids, torch.zeros(1), (), 100 * SECONDS
        )
        losses = token_losses(self.engine, batch, self.mels, self.engine.dtype)
        self.engine.backward(losses.sum() / TOKENS / self.world.size, last=True)
        if self._writer:
            holding = time.perf_counter()
            self._writer.hold()
            self.held += time.perf_counter() - holding
        self.engine.step(lr=1e-5)
        return time.perf_counter() - began

    def measure(
        self, begin: Callable[[int], Wait], folder: Path, number: int, *, train: bool
    ) -> dict[str, float]:
        """Save, and with `train` take steps until it is durable. Returns figures on rank 0."""
        usual = statistics.median(self.step() for _ in range(STEPS)) if train else 0.0
        if self.world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            os.sync()  # what others have written must not be in the way
        self.world.barrier()
        self.durable, steps = None, []
        began, cpu = time.perf_counter(), time.process_time()
        self.held = 0.0
        wait = begin(number)
        blocking = time.perf_counter() - began
        while train and self.world.share(self.durable is None):
            steps.append(self.step())
        wait()
        seconds: Any = self.world.gather(
            (blocking + self.held, self.durable - began if self.durable else 0.0, time.process_time() - cpu)
        )
        if seconds is None:
            return {}
        blocked, durable, busy = zip(*seconds, strict=True)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        figures = {"blocking_seconds": max(blocked), "total_seconds": max(durable), "gigabytes": size / 1e9}
        if train:
            return figures | {"hidden_seconds": sum(steps) - usual * len(steps), "step_seconds": usual}
        return figures | {"cpu_seconds_per_gigabyte": sum(busy) / (size / 1e9)}

    def load(self, method: str) -> float:
        """Load what a method has saved. Returns the seconds until all ranks could take a step."""
        self.world.barrier()
        began = time.perf_counter()
        if method == "deepspeed":
            folder, _ = self.engine._engine.load_checkpoint(str(self.work / method))
            assert folder is not None
        else:
            reader = Reader(checkpoint.find(self.work / "earwitness/checkpoints")[0])
            self.engine.load(reader, reader.manifest.updates)
            self.engine.publish()
        self.world.barrier()
        return time.perf_counter() - began

    def _mark(self, _: object = None) -> None:
        self.durable = time.perf_counter()

    def _save_earwitness(self, number: int) -> Wait:
        assert self._writer
        self._writer.save(Manifest(step=number, updates=self.engine.updates(), identity={}))
        return self._writer.finish

    def _save_deepspeed(self, number: int) -> Wait:
        folder = self.work / "deepspeed"
        self.engine._engine.save_checkpoint(str(folder), tag=str(number))

        def wait() -> None:
            for file in filter(Path.is_file, folder.rglob("*")):
                sync(file)
            self._mark()

        return wait

    def _save_dcp(self, number: int) -> Wait:
        folder = self.work / "dcp" / str(number)
        future: Any = dcp.async_save(
            self._state, checkpoint_id=folder, process_group=self._group, async_stager=self._stager
        )
        future.add_done_callback(self._mark)
        return future.result


def save(trainer: Trainer, rounds: int, methods: Sequence[str]) -> dict[str, Any]:
    """Save in turn with each method, training on meanwhile unless its name ends in `sync`. Returns a row for
    each round."""
    begin = trainer.prepare_saving()
    for _ in range(2):
        trainer.step()
    saves: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for number in range(rounds * len(methods)):
        method = methods[number % len(methods)]
        name, *sync = method.split()
        folder = trainer.work / name / ("checkpoints" if name == "earwitness" else "")
        saves[method].append(
            trainer.measure(begin[name], folder, 1 + number, train=not sync and name != "deepspeed")
        )
    return saves


def main(work: Path, action: str, *arguments: str) -> None:
    """Do as a rank what the command line says."""
    device = distributed.choose_device(int(os.environ["LOCAL_RANK"]), "here", None)
    world = distributed.start(["here"] * int(os.environ["WORLD_SIZE"]), device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.size))
    trainer = Trainer(work, world)
    found = trainer.load(*arguments) if action == "load" else save(trainer, int(arguments[0]), arguments[1:])
    if world.rank == 0:
        (work / "found.json").write_text(
            json.dumps({"parameters": trainer.parameters, action: found}), encoding="utf-8"
        )
    world.barrier()
    distributed.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
