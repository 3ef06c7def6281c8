"""How much audio a forward pass takes: what the config says or, as `auto`, what the memory holds.

On a GPU that is searched once per run, kind of card and setup, with the largest samples that there can be.
One window goes through the engine, whose gradients and buffers count, too. More are tried on the model alone:
a rank that runs out of memory there leaves no other one waiting, and no half a gradient behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from configs.run.events import MicroSeconds
from configs.run.folder import RunDir
from configs.run.memory import next_seconds
from configs.schema import RunConfig
from data.batch import Sample, collate
from data.captions import Tokens
from data.decode import SAMPLE_RATE
from data.windows import HOP
from trainer.distributed import World
from trainer.engines import Engine
from trainer.loss import token_losses
from trainer.model import Captioner

ON_CPU = 120.0
"""Seconds of audio per forward pass on a CPU: more are no faster there."""
RESERVE = 0.1
"""Share of a GPU's memory that is left free: pieces between tensors of ever other sizes cannot be used."""
SMALLER = 0.8
"""What is tried next of a number of windows that does not fit."""


def micro_seconds(
    config: RunConfig, run: RunDir, attempt: int, world: World, captioner: Captioner, engine: Engine
) -> float:
    """Seconds of audio per forward pass, the same on all ranks, which call it once the state is loaded."""
    if config.batch.micro_seconds != "auto":
        return config.batch.micro_seconds
    window_seconds = captioner.frames * HOP / SAMPLE_RATE
    most = math.ceil(config.batch.global_size / world.size)
    device, setup = _device(world), _setup(config, world)
    known = world.share(next_seconds(run.ledger.read(), device, setup) if world.rank == 0 else None)
    if known:
        seconds, why = known
    elif world.device.type == "cpu":
        seconds, why = min(ON_CPU, most * window_seconds), "more is no faster on a CPU"
    else:
        gpu = Gpu(engine, captioner, world.device)
        windows = search(gpu, most, world)
        gpu.close()
        seconds, why = windows * window_seconds, "the most that fits"
    if world.rank == 0:
        print(f"batch.micro_seconds: auto takes {seconds:g} s: {why}", flush=True)
        run.ledger.record(
            MicroSeconds(
                attempt=attempt, device=device, setup=setup, seconds=seconds, least=window_seconds, why=why
            )
        )
    return seconds


def _device(world: World) -> str:
    """`cpu`, or the names of the ranks' GPUs."""
    if world.device.type == "cpu":
        return "cpu"
    names = world.gather(torch.cuda.get_device_name(world.device)) or []
    return world.share(", ".join(sorted(set(names))))


def _setup(config: RunConfig, world: World) -> str:
    """What decides on what fits, beside the device."""
    parts = [
        f"{world.size} ranks",
        f"{config.batch.global_size} samples a step",
        config.engine.backend,
        config.engine.dtype,
    ]
    changed = config.engine.zero2.model_dump(exclude_defaults=True)
    if config.engine.backend == "zero2" and changed:
        parts.append(str(changed))
    if config.model.compile:
        parts.append("compiled")
    if config.model.gradient_checkpointing:
        parts.append("gradient checkpointing")
    return ", ".join(parts)


class Memory(Protocol):
    """What `search` asks of a GPU."""

    limit: int
    """Bytes that training may take."""

    def peak(self, windows: int) -> float:
        """Bytes that micro-batches of so many whole windows take; infinity where there are too few. No rank
        waits for another one meanwhile."""


def search(memory: Memory, most: int, world: World) -> int:
    """The most whole windows, from 1 to `most`, that fit on every rank. All ranks try the same numbers at the
    same time."""
    peaks = {1: memory.peak(1)}
    fitting = tried = 1
    while tried == fitting and 2 * tried <= most:
        tried *= 2
        peaks[tried] = memory.peak(tried)
        if not world.any(peaks[tried] > memory.limit):
            fitting = tried
    room = most if tried == fitting else tried - 1
    windows = world.lowest(extrapolate(peaks, memory.limit, room))
    while windows > fitting and world.any(memory.peak(windows) > memory.limit):
        windows = int(SMALLER * windows)
    return max(fitting, windows)


def extrapolate(peaks: Mapping[int, float], limit: float, most: int) -> int:
    """Whole windows that take up to `limit` bytes, on the line through the last two finite ones of `peaks`
    (bytes by windows); from 1 to `most`."""
    measured = sorted(windows for windows, peak in peaks.items() if math.isfinite(peak))
    if len(measured) < 2:
        return 1
    before, last = measured[-2:]
    per_window = (peaks[last] - peaks[before]) / (last - before)
    if per_window <= 0:
        return most
    return max(1, min(most, last + math.floor((limit - peaks[last]) / per_window)))


class Gpu:
    """The memory of this rank's GPU. All ranks make one at the same point."""

    def __init__(self, engine: Engine, captioner: Captioner, device: torch.device) -> None:
        self._captioner, self._dtype, self._device = captioner, engine.dtype, device
        in_engine = self._most(lambda: self._step(engine))
        self._module = engine.evaluation_module()
        for coder, same in (
            (self._module.encoder, captioner.model.encoder),
            (self._module.decoder, captioner.model.decoder),
        ):
            coder.checkpointing = same.checkpointing
        for name, parameter in self._module.named_parameters():
            parameter.requires_grad_(name in captioner.trained)
        self._engine_takes = in_engine - self._most(lambda: self._pass(1))
        # NCCL and cuBLAS have theirs by now. Pieces that torch holds without need count as free.
        free, total = torch.cuda.mem_get_info(device)
        self.limit = torch.cuda.memory_reserved(device) + free - int(RESERVE * total)
        # What is tried leaves the reserve to them, too: they do not say so well what they lack.
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, self.limit / total)), device)

    def close(self) -> None:
        """Leave the memory to training."""
        del self._module
        torch.cuda.set_per_process_memory_fraction(1.0, self._device)
        torch.cuda.empty_cache()

    def peak(self, windows: int) -> float:
        """Bytes that micro-batches of so many whole windows take; infinity where there are too few."""
        try:
            return self._engine_takes + self._most(lambda: self._pass(windows))
        except torch.OutOfMemoryError:
            return math.inf

    def _most(self, compute: Callable[[], None]) -> int:
        """Bytes that are taken at most meanwhile."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        compute()
        return torch.cuda.max_memory_allocated(self._device)

    def _step(self, engine: Engine) -> None:
        """A step but for its update, of two windows, one after the other: the second one finds the gradient
        of the first. It is 0, wherever an engine may keep it, and then forgotten."""
        for is_last in (False, True):
            engine.backward(self._losses(engine, 1).sum() * 0.0, last=is_last)
        engine.forget()

    def _pass(self, windows: int) -> None:
        """Forward and back through all layers to the first weights that are trained. Nothing is accumulated,
        and no hook of the engine is called."""
        first = next(parameter for parameter in self._module.parameters() if parameter.requires_grad)
        torch.autograd.grad(self._losses(self._module, windows).sum(), first)

    def _losses(self, forward: Callable[..., Any], windows: int) -> torch.Tensor:
        """Of the largest samples that there can be: whole windows, captions that fill the decoder's
        positions."""
        config, frames = self._captioner.config, self._captioner.frames
        tokens = Tokens([0] * config.max_target_positions, [0] * config.max_target_positions)
        sample = Sample(np.zeros(frames * HOP, np.int16), tokens, "", source=0, key="", frames=frames)
        batch = collate([sample] * windows).to(self._device)
        return token_losses(forward, batch, config, self._dtype)
