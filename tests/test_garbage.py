"""Garbage is collected between steps, and nowhere else while a run trains."""

from __future__ import annotations

import gc
import weakref

from trainer.garbage import EVERY_STEPS, collected_between_steps


class Knot:
    """Garbage that only a collection finds: it refers to itself."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_is_collected_where_it_is_told_to_and_nowhere_else() -> None:
    with collected_between_steps() as collect:
        knot = weakref.ref(Knot())
        for step in range(1, EVERY_STEPS):
            _ = [Knot() for _ in range(100)]  # thousands: Python would have collected by now
            collect(step)
        assert knot() is not None
        collect(EVERY_STEPS)
        assert knot() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_what_is_there_at_the_beginning_is_not_looked_at_again() -> None:
    with collected_between_steps():
        assert len(gc.get_objects()) < 1000 < gc.get_freeze_count()
