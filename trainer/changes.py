"""What may change under a run: the settings and data that a checkpoint must share with the run that goes on
from it. Each field of the schema says whether it is one of them (configs/schema.py, Change)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from configs.errors import ConfigError
from configs.schema import Change, RunConfig, Section, Source
from data.order import ORDER_VERSION

SOURCES = {Change.NEW_EPOCH: "data.sources", Change.ON_PURPOSE: "data.sources.captions"}
"""Names under which the settings of all sources are compared, by what a change of them means."""
INDEX, ORDER = "index", "order"
"""Names of what is compared and is no setting: the digest of the samples, and ORDER_VERSION."""
PINNED = (Change.ON_PURPOSE, Change.NEW_EPOCH, Change.NEVER)
"""Settings that are compared."""
EXPLAINED = {
    INDEX: (
        "index (the samples, by digest: a shard was added, removed, changed, or indexed in full after a quick"
        " look)"
    ),
    ORDER: (
        "order (version of the order in which samples come: this Earwitness has another one than that which"
        " wrote the checkpoint, with which the run goes on as it was)"
    ),
}


def pinned(config: RunConfig, index_digest: str) -> dict[str, Any]:
    """What must stay as it is, by name; JSON values. A manifest keeps it as `identity`."""
    values: dict[str, Any] = {}
    for name, change, _ in _settings(RunConfig):
        if change in PINNED and name != SOURCES[Change.NEW_EPOCH]:
            values[name] = reduce(getattr, name.split("."), config)
    for change, name in SOURCES.items():
        keys = [key for key, of_key in marks(Source).items() if of_key is change]
        values[name] = [[getattr(source, key) for key in keys] for source in config.data.sources]
    values[INDEX] = index_digest
    values[ORDER] = ORDER_VERSION
    return dict(json.loads(json.dumps(values)))


def marks(section: type[Section]) -> dict[str, Change]:
    """What a change of each field of a section means, by its name. Raises TypeError for a field without a
    mark."""
    changes = {}
    for name, field in section.model_fields.items():
        mark = next((mark for mark in field.metadata if isinstance(mark, Change)), None)
        if mark is None:
            raise TypeError(f"{section.__name__}.{name} says nothing of what a change of it means")
        changes[name] = mark
    return changes


def _settings(section: type[Section], at: str = "") -> Iterator[tuple[str, Change, Any]]:
    """Names as `optim.lr` and `data.augment.mix`, what a change of them means, and their defaults."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from _settings(inner, f"{at}{name}.")
        else:
            yield f"{at}{name}", marks(section)[name], field.default


def _unnamed() -> dict[str, Any]:
    defaults = {name: default for name, change, default in _settings(RunConfig) if change in PINNED}
    named = {name: default for name, default in defaults.items() if default is not PydanticUndefined}
    return dict(json.loads(json.dumps(named))) | {ORDER: 1, "data.window": "full"}


UNNAMED = _unnamed()
"""Values in checkpoints that do not name them yet: the defaults, but that every clip was padded."""
OF_THE_ORDER = {
    *(name for name, change, _ in _settings(RunConfig) if change is Change.NEW_EPOCH),
    SOURCES[Change.NEW_EPOCH],
    INDEX,
    ORDER,
}
"""On these the order of the samples depends. If one was changed on purpose, a new epoch begins at the step of
the checkpoint."""
FIXED = {name for name, change, _ in _settings(RunConfig) if change is Change.NEVER}
"""Never allowed to change."""


def _completed(before: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint pins, with the values that it does not name yet."""
    captions = SOURCES[Change.ON_PURPOSE]
    of_sources = [_completed_source(*values) for values in before.get(captions, [])]
    return UNNAMED | before | ({captions: of_sources} if of_sources else {})


def _completed_source(key: Any, *others: Any) -> list[Any]:
    """Caption key, captions, style and loss weight of a source; the second and the last came later."""
    match others:
        case (style,):
            return [key, "first", style, 1.0]
        case (captions, style):
            return [key, captions, style, 1.0]
    return [key, *others]


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of what is not as it was."""
    before = _completed(before)
    return [name for name in now if before.get(name) != now[name]]


def begins_new_epoch(changed: list[str]) -> bool:
    """Whether the order of the samples depends on something that was changed."""
    return bool(OF_THE_ORDER & set(changed))


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
        if set(refused) & FIXED:
            advice += f" (model.init_from={checkpoint} begins with these weights)."
        else:
            advice += f", or change it on purpose: 'run.allow_change=[{','.join(changed)}]'"
            advice += " (a new epoch begins then)." if begins_new_epoch(refused) else "."
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
    before = _completed(before)
    return [
        f"{EXPLAINED.get(name, name)}: {_short(before.get(name))} -> {_short(now[name])}" for name in names
    ]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
