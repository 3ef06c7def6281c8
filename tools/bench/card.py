"""`python -m tools.bench.card`: how fast the device is at what a step of Whisper consists of; prints JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from data.batch import Segments
from data.features import log_mel
from tools.bench.report import Figures
from trainer.distributed import has_bf16
from trainer.whisper import attend

WIDTH, HEADS = 1280, 20
"""Of whisper-large-v3-turbo."""
POSITIONS, WINDOW_SAMPLES = 1500, 480_000
"""Encoder positions, and samples at 16 kHz, of a window of 30 s."""
PINNED_GIGABYTES = 1


def measure(device: torch.device) -> Figures:
    """Speed of a matrix product, of attention and of log-mel, and on a GPU of copies from pinned memory."""
    clips = 16 if device.type == "cuda" else 1
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    figures = {
        "matrix_tflops": _matrix_tflops(device, dtype, clips * POSITIONS),
        "attention_tflops": _attention_tflops(device, dtype, clips),
        **_log_mel(device, clips),
    }
    if device.type == "cuda":
        figures |= _copies(device)
    return figures


def _matrix_tflops(device: torch.device, dtype: torch.dtype, rows: int) -> float:
    """(rows, WIDTH) x (WIDTH, 4 WIDTH), as the first linear layer of a block."""
    x = torch.randn(rows, WIDTH, device=device, dtype=dtype)
    weight = torch.randn(4 * WIDTH, WIDTH, device=device, dtype=dtype)
    seconds = _seconds(lambda: x @ weight.T, device)
    return 2 * rows * WIDTH * 4 * WIDTH / seconds / 1e12


def _attention_tflops(device: torch.device, dtype: torch.dtype, clips: int) -> float:
    """The encoder's attention, forward and backward, in clips of 30 s. Backward counts 2.5 times forward."""
    audio = Segments.of([POSITIONS] * clips).to(device)
    shape = (clips * POSITIONS, HEADS, WIDTH // HEADS)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, device=device, dtype=dtype)
    seconds = _seconds(lambda: attend(q, k, v, audio, audio, False).backward(gradient), device)
    return 3.5 * 4 * clips * POSITIONS**2 * WIDTH / seconds / 1e12


def _log_mel(device: torch.device, clips: int) -> Figures:
    """Milliseconds per clip of 30 s; on a GPU the largest difference to the CPU, too."""
    waveforms = torch.randint(-20_000, 20_000, (clips * WINDOW_SAMPLES,), dtype=torch.int16)
    sound, audio = Segments.of([WINDOW_SAMPLES] * clips), Segments.of([POSITIONS] * clips)

    def on(place: torch.device) -> Tensor:
        return log_mel(there, sound.to(place), audio.to(place), 128, 2 * POSITIONS)

    there = waveforms.to(device)
    figures = {"log_mel_milliseconds": _seconds(lambda: on(device), device) * 1e3 / clips}
    if device.type == "cuda":
        on_device = on(device).cpu()
        there = waveforms
        figures["log_mel_difference"] = float((on_device - on(torch.device("cpu"))).abs().max())
    return figures


def _copies(device: torch.device) -> Figures:
    """Seconds to pin a gigabyte of memory, and gigabytes per second from and to it."""
    size = PINNED_GIGABYTES * 10**9
    began = time.perf_counter()
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    pinning = time.perf_counter() - began
    there = torch.empty(size, dtype=torch.uint8, device=device)
    return {
        "pinning_seconds_per_gigabyte": pinning / PINNED_GIGABYTES,
        "to_host_gigabytes_per_second": size
        / 1e9
        / _seconds(lambda: host.copy_(there, non_blocking=True), device),
        "to_device_gigabytes_per_second": size
        / 1e9
        / _seconds(lambda: there.copy_(host, non_blocking=True), device),
    }


def _seconds(work: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    """Mean seconds of some work, once it is warm."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        work()
    wait()
    began = time.perf_counter()
    for _ in range(rounds):
        work()
    wait()
    return (time.perf_counter() - began) / rounds


if __name__ == "__main__":
    print(json.dumps(measure(torch.device("cuda" if torch.cuda.is_available() else "cpu"))))
