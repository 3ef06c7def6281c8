"""Python's garbage collection, between steps rather than anywhere in them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_STEPS = 50
"""Steps between collections."""


@contextmanager
def collected_between_steps() -> Iterator[Callable[[int], None]]:
    """Let Python collect garbage only where it is told the number of steps taken, on all ranks after the same
    ones: a rank that collects in the middle of a step lets all others wait.

    What is there at the beginning (modules, model, index) is kept, and not looked at again.
    """
    gc.collect()
    gc.freeze()
    gc.disable()

    def collect(step: int) -> None:
        if step % EVERY_STEPS == 0:
            gc.collect()

    try:
        yield collect
    finally:
        gc.enable()
        gc.unfreeze()
