"""Numbers on their way from the device to the host."""

from __future__ import annotations

import torch


class OnItsWay:
    """A number that the device is still computing. It is copied as soon as it is there: who reads it does not
    wait for what the device was given to do afterwards."""

    def __init__(self, number: torch.Tensor) -> None:
        """number: () or (1,), on any device."""
        self._copied: torch.cuda.Event | None = None
        self._number = number.clone()
        if number.is_cuda:
            self._number = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(number.device))

    def read(self) -> float:
        """Wait for the number."""
        if self._copied:
            self._copied.synchronize()
        return self._number.item()
