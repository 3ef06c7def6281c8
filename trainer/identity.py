"""What makes a run the same run: the settings and data that a checkpoint must share with the run that goes on
from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.schema import RunConfig
from data.order import ORDER_VERSION

ORDER = ("run.seed", "batch.global_size", "data.shuffle_window", "data.sources", "index", "order")
"""On these the order of the samples depends. If one was changed on purpose, a new epoch begins at the step of
the checkpoint."""
SETTINGS = (
    "run.seed",
    "model.name_or_path",
    "model.init_from",
    "model.freeze",
    "batch.global_size",
    "engine.dtype",
    "data.max_seconds",
    "data.overlong",
    "data.long_caption",
    "data.shuffle_window",
    "optim.lr",
    "optim.betas",
    "optim.eps",
    "optim.weight_decay",
    "optim.clip_grad_norm",
    "optim.schedule",
    "optim.warmup_fraction",
)
"""Compared as they are. All else may change: ranks, micro-batch, backend, URLs, intervals, more steps."""
FIXED = ("model.name_or_path", "model.init_from", "model.freeze")
"""Never allowed: the weights come from the run's base and checkpoint, whatever these say."""
NAMES = {
    "index": (
        "index (the samples, by digest: a shard was added, removed, changed, or indexed in full after a quick"
        " look)"
    ),
    "order": (
        "order (version of the order in which samples come: this Earwitness has another one than that which"
        " wrote the checkpoint, with which the run goes on as it was)"
    ),
}
UNNAMED = {"order": 1}
"""Values in checkpoints that do not name them yet."""


def identity(config: RunConfig, index_digest: str) -> dict[str, Any]:
    """What must stay as it is, by name; JSON values."""
    values = config.model_dump(mode="json")
    found = {name: values[name.split(".")[0]][name.split(".")[1]] for name in SETTINGS}
    found["data.sources"] = [[source.name, source.weight] for source in config.data.sources]
    found["data.sources.captions"] = [[source.caption_key, source.style] for source in config.data.sources]
    found["index"] = index_digest
    found["order"] = ORDER_VERSION
    return dict(json.loads(json.dumps(found)))


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of what is not as it was."""
    before = UNNAMED | before
    return [name for name in now if before.get(name) != now[name]]


def check_changes(before: dict[str, Any], now: dict[str, Any], allowed: list[str], checkpoint: Path) -> None:
    """Raises ConfigError, with the difference, for what was changed though `run.allow_change` does not name
    it."""
    possible = [name for name in now if name not in FIXED]
    if unknown := sorted(set(allowed) - set(possible)):
        raise ConfigError(
            f"run.allow_change: {', '.join(unknown)} need not be allowed, or cannot be; there are"
            f" {', '.join(possible)}"
        )
    changed = changes(before, now)
    refused = [name for name in changed if name not in allowed]
    if refused:
        advice = "Undo that, or start a new run with another run.name"
        if set(refused) & set(FIXED):
            advice += f" (model.init_from={checkpoint} begins with these weights)."
        else:
            advice += f", or change it on purpose: 'run.allow_change=[{','.join(changed)}]'"
            advice += " (a new epoch begins then)." if set(refused) & set(ORDER) else "."
        raise ConfigError(
            "\n  ".join(
                [
                    f"{checkpoint}: going on from here would not be the same run, because these changed:",
                    *differences(before, now, refused),
                ]
            )
            + f"\n{advice}"
        )


def differences(before: dict[str, Any], now: dict[str, Any], names: list[str]) -> list[str]:
    """What was changed, a line for each name."""
    before = UNNAMED | before
    return [f"{NAMES.get(name, name)}: {_short(before.get(name))} -> {_short(now[name])}" for name in names]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
