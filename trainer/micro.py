"""How much audio a forward pass takes."""

from __future__ import annotations

from configs.schema import Batch

ON_CPU = 120.0
"""Seconds of audio per forward pass on a CPU: more are no faster there."""


def micro_seconds(settings: Batch) -> float:
    """Seconds of audio per forward pass."""
    return ON_CPU if settings.micro_seconds == "auto" else settings.micro_seconds
