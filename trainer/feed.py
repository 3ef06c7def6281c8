"""Steps as micro-batches on the device, one step ahead of the training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from data.batch import Batch, Size, collate
from data.loader import Loader, Step
from trainer.loss import count_tokens, token_weights


@dataclass(frozen=True)
class Fed:
    """What a rank has for a step: its samples, the same as micro-batches on its device, their caption tokens,
    and the sum of what these count in what is learnt."""

    step: Step
    batches: list[Batch]
    tokens: int
    weight: float

    @classmethod
    def nothing(cls, number: int) -> Fed:
        """Of step `number`."""
        return cls(Step(number, [], [], 0.0), [], 0, 0.0)


class Feed(Iterator[Fed]):
    """Takes the steps of a loader, and cuts, collates and copies them in a thread of its own, one step ahead.

    A GPU gets its copies from pinned memory and on a stream of their own, beside what it computes. (Both
    kinds of memory come from torch's caching allocators, which use it again.) What fails surfaces in `next`.
    """

    def __init__(self, loader: Loader, size: Size, device: torch.device, loss_weights: torch.Tensor) -> None:
        """loss_weights: (sources,) float32, on the CPU."""
        self._loader, self._size, self._device = loader, size, device
        self._loss_weights = loss_weights
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._worker = ThreadPoolExecutor(1, "feed")
        self._waited = 0.0
        """Seconds that the next step was waited for."""
        self._coming: Future[Fed | None] = self._worker.submit(self._prepare)

    def ready(self, seconds: float | None) -> bool:
        """Wait until `next` has something to give at once: the next step, the error in its place, or the end.
        False if that takes longer than `seconds`."""
        began = time.perf_counter()
        wait([self._coming], seconds)
        self._waited += time.perf_counter() - began
        return self._coming.done()

    def __next__(self) -> Fed:
        self.ready(None)
        fed = self._coming.result()
        if fed is None:
            raise StopIteration
        fed.step.waited, self._waited = self._waited, 0.0
        if self._stream:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._stream)  # before the next copies begin there
            for batch in fed.batches:
                batch.map(lambda tensor: _used_on(stream, tensor))
        self._coming = self._worker.submit(self._prepare)
        return fed

    def close(self) -> None:
        """Give up what is under way."""
        self._loader.close()
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _prepare(self) -> Fed | None:
        step = next(self._loader, None)
        if step is None:
            return None
        batches = [collate(samples) for samples in self._size.cut(step.samples)]
        tokens = sum(map(count_tokens, batches))
        weights = [token_weights(batch, self._loss_weights) for batch in batches]
        weight = sum(float(of_batch.sum(dtype=torch.float64)) for of_batch in weights)
        if self._stream:
            with torch.cuda.stream(self._stream):  # makes its device this thread's, too
                batches = [batch.map(torch.Tensor.pin_memory).to(self._device) for batch in batches]
        return Fed(step, batches, tokens, weight)


def _used_on(stream: torch.cuda.Stream, tensor: torch.Tensor) -> torch.Tensor:
    """Let a tensor's memory not be used again before the stream has come so far."""
    tensor.record_stream(stream)
    return tensor
