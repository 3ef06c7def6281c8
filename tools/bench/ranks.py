"""The benchmark of checkpoints: `python -m tools.bench.ranks WORK save ROUNDS METHOD...` and `... WORK load
METHOD` is one of the ranks that save or load; rank 0 writes WORK/result.json."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from configs.load import dump
from configs.run.files import write_atomic
from configs.run.folder import RunDir
from configs.schema import RunConfig
from data.batch import Sample, collate
from data.captions import Tokens
from data.decode import SAMPLE_RATE
from trainer import checkpoint, devices, distributed, model
from trainer.checkpoint import Manifest, Reader, sync
from trainer.distributed import World
from trainer.engines.zero2 import Zero2Engine
from trainer.loss import token_losses
from trainer.writer import Writer

SECONDS = 2
"""Audio window: short, so that a step of a large model takes about a second."""
TOKENS = 16
"""Tokens of a caption."""
STEPS = 3
"""Undisturbed steps before each save; their median is what a step takes."""
SYNC = " sync"
"""Ends the name of a method that is measured without training meanwhile."""
Wait = Callable[[], object]
"""Waits until a save is durable."""
Begin = Callable[[int], Wait]
"""Begins the save of that number."""


class _Cost(NamedTuple):
    """Seconds that a save has cost a rank."""

    blocking: float
    """Until training could go on."""
    durable: float
    """Until it was durable; 0 on a rank that cannot tell."""
    cpu: float


class Trainer:
    """Trains on noise, and saves in several ways."""

    def __init__(self, work: Path, world: World) -> None:
        self.work, self.world = work, world
        sections = {
            "run": {"name": "bench"},
            "model": {"name_or_path": str(work / "model")},
            "data": {"sources": [{"name": "noise", "shards": "none"}]},
            "optim": {"max_steps": 1},
            "engine": {"dtype": "bf16" if distributed.has_bf16(world.device) else "fp32"},
        }
        config = RunConfig.model_validate(sections)
        captioner = model.load(config.model, seed=0)
        if world.rank == 0:
            run = RunDir(work / "earwitness")
            model.save_base(run, captioner)
            write_atomic(run.config, dump(config))
        self.shapes = {name: list(parameter.shape) for name, parameter in captioner.trained.items()}
        self.whisper = captioner.config
        self.parameters = sum(parameter.numel() for parameter in captioner.model.parameters())
        self.engine = Zero2Engine(captioner.model, config, world)
        self._writer: Writer | None = None
        self.held = 0.0
        """Seconds that steps have waited for a snapshot."""
        self.durable: float | None = None
        """When the last save was seen on disk by a rank that can tell; None while it is under way."""

    def prepare_saving(self) -> dict[str, Begin]:
        """Allocate what each method of saving allocates once. Returns the methods by name."""
        self._writer = Writer(
            self.work / "earwitness/checkpoints",
            0,
            self.engine,
            self.world,
            self.shapes,
            committed=self._mark,
        )
        self._state = {
            f"{fragment.name}:{fragment.start}:{kind}": tensor
            for fragment in self.engine.fragments()
            for kind, tensor in fragment.tensors.items()
        }
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )
        self._group = dist.new_group(backend="gloo")
        return {"earwitness": self._save_earwitness, "deepspeed": self._save_deepspeed, "dcp": self._save_dcp}

    def step(self) -> float:
        """Take a step; returns its seconds."""
        began = time.perf_counter()
        waveform = torch.randint(-3000, 3000, (SECONDS * SAMPLE_RATE,), dtype=torch.int16)
        ids = torch.randint(9, 99, (TOKENS,))
        tokens = Tokens(ids.tolist(), ids.tolist())
        batch = collate([Sample(waveform.numpy(), tokens, "", 0, "", frames=100 * SECONDS)])
        losses = token_losses(self.engine, batch, self.whisper, self.engine.dtype)
        self.engine.backward(losses.sum() / TOKENS / self.world.size, last=True)
        if self._writer:
            holding = time.perf_counter()
            self._writer.hold()
            self.held += time.perf_counter() - holding
        self.engine.step(lr=1e-5)
        return time.perf_counter() - began

    def measure(self, begin: Begin, folder: Path, number: int, *, train: bool) -> dict[str, float]:
        """Save into a folder, and with `train` take steps until that is durable. Returns figures on rank
        0."""
        usual = statistics.median(self.step() for _ in range(STEPS)) if train else 0.0
        if self.world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            os.sync()  # what others have written must not be in the way
        self.world.barrier()
        self.durable = None
        self.held = 0.0
        steps = []
        began, cpu = time.perf_counter(), time.process_time()
        wait = begin(number)
        blocking = time.perf_counter() - began
        while train and self.world.share(self.durable is None):
            steps.append(self.step())
        wait()
        cost = _Cost(
            blocking=blocking + self.held,
            durable=0.0 if self.durable is None else self.durable - began,
            cpu=time.process_time() - cpu,
        )
        costs: Any = self.world.gather(cost)
        if costs is None:
            return {}
        gigabytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9
        figures = {
            "blocking_seconds": max(cost.blocking for cost in costs),
            "total_seconds": max(cost.durable for cost in costs),
            "gigabytes": gigabytes,
        }
        if train:
            return figures | {"hidden_seconds": sum(steps) - usual * len(steps), "step_seconds": usual}
        return figures | {"cpu_seconds_per_gigabyte": sum(cost.cpu for cost in costs) / gigabytes}

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
    """Save with each method in turn, and train on meanwhile where that is possible. Returns for each method
    the figures of each round."""
    begin = trainer.prepare_saving()
    for _ in range(2):
        trainer.step()
    saves: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    number = 0
    for _ in range(rounds):
        for method in methods:
            number += 1
            name = method.removesuffix(SYNC)
            folder = trainer.work / name
            if name == "earwitness":
                folder /= "checkpoints"
            train = not method.endswith(SYNC) and name != "deepspeed"
            saves[method].append(trainer.measure(begin[name], folder, number, train=train))
    return saves


def main(work: Path, action: str, *arguments: str) -> None:
    """Do the part of one rank."""
    device = devices.choose_device(int(os.environ["LOCAL_RANK"]), "here", None)
    devices.take(device, None)
    world = distributed.start(["here"] * int(os.environ["WORLD_SIZE"]), device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.size))
    trainer = Trainer(work, world)
    result: dict[str, Any] = {"parameters": trainer.parameters}
    if action == "load":
        result["load"] = trainer.load(*arguments)
    else:
        rounds, *methods = arguments
        result["save"] = save(trainer, int(rounds), methods)
    if world.rank == 0:
        (work / "result.json").write_text(json.dumps(result), encoding="utf-8")
    world.barrier()
    distributed.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
