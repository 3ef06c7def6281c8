"""YAML files and key=value overrides -> RunConfig. All errors are reported at once."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.errors import ConfigError
from configs.metrics import is_higher_better
from configs.schema import SECRET_URL, RunConfig, Section, Zero2


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file, merge what it extends, apply `key=value` overrides and validate.

    Raises ConfigError naming every wrong key at once, with the nearest valid one.
    """
    values = read_yaml(Path(path))
    for override in overrides:
        _override(values, override)
    return validate(values, str(path))


def load_kept(path: Path) -> RunConfig:
    """The config that a run has kept, by this version or an older one. Raises ConfigError.

    Before clips were packed every clip was padded, micro-batches had a number of samples, and sbatch and srun
    were handed any options; any text was taken for the metric of the best checkpoint."""
    values = read_yaml(path)
    for options in ("sbatch", "srun_args"):  # what is submitted is not read from here
        values.get("slurm", {}).pop(options, None)
    values.get("batch", {}).pop("micro_size", None)
    values.setdefault("data", {}).setdefault("window", "full")
    engine = values.get("engine", {})
    try:
        Zero2.model_validate(engine.get("zero2", {}))
    except ValidationError:  # was handed to DeepSpeed unread; what was trained with it is the same
        del engine["zero2"]
    names = [source.get("name", "") for source in values.get("data", {}).get("sources", [])]
    evaluate = values.get("evaluate", {})
    try:
        is_higher_better(evaluate.get("best_metric", "validation/loss"), names)
    except ValueError:  # any text was taken, and marked nothing
        del evaluate["best_metric"]
    return validate(values, str(path))


def validate(values: dict[str, Any], origin: str) -> RunConfig:
    """Nested values -> RunConfig; `origin` says in errors where they came from."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise explained(error, origin) from None


def explained(error: ValidationError, origin: str) -> ConfigError:
    """What is wrong, a line for each value; `origin` says where they came from."""
    return ConfigError("\n".join(f"{origin}: {_explain(e)}" for e in error.errors()))


def dump(config: RunConfig) -> str:
    """RunConfig -> YAML with every setting, which `load` reads back to the same config."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120
    )


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML file; mappings are merged over those of the file it `extends` (a path relative to it), all
    else replaces."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: extends itself through {' -> '.join(p.name for p in seen)}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, this is a {type(values).__name__}")
    parent = values.pop("extends", None)
    if not isinstance(parent, str | None):
        raise ConfigError(f"{path}: extends one other file, by its name; this is {parent!r}")
    return values if parent is None else merge(read_yaml(path.parent / parent, (*seen, path)), values)


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings; where both have a key, `above` wins, and only mappings are merged
    further."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


class _Loader(yaml.SafeLoader):
    """Reads 5e-5 as a number, as everybody means it (YAML 1.1 wants 5.0e-5)."""


class _Dumper(yaml.SafeDumper):
    """Quotes what _Loader would take for a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text with escapes where it has breaks and controls: as they are not all would be read back."""
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)


def _override(values: dict[str, Any], override: str) -> None:
    """Apply `a.b=value` in place. An item of a list is named by its number or by its `name`:
    `data.sources.speech.weight=2`."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"{override!r}: an override is written key=value, e.g. optim.lr=1e-5")
    *parents, last = dotted.split(".")
    at: Any = values
    for part in parents:
        at = at[_number(at, part, override)] if isinstance(at, list) else at.setdefault(part, {})
        if not isinstance(at, dict | list):
            raise ConfigError(f"{override!r}: {part} is a value, not a section")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: the value is not valid YAML; quote it for the shell") from None
    if isinstance(at, list):
        at[_number(at, last, override)] = value
    else:
        at[last] = value


def _number(items: list[Any], part: str, override: str) -> int:
    for number, item in enumerate(items):
        if part == str(number) or (isinstance(item, dict) and item.get("name") == part):
            return number
    names = [item["name"] for item in items if isinstance(item, dict) and "name" in item]
    raise ConfigError(
        f"{override!r}: no item {part!r} in that list; it has {', '.join(names) or f'{len(items)} items'}"
    )


def _explain(error: Any) -> str:
    """One pydantic error -> one line."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        *parents, key = error["loc"]
        return _explain_key(where, str(key), _section_at(parents))
    if error["type"] == "missing":
        return f"{where}: missing"
    if error["type"] == "model_type":
        return f"{where}: settings by name are wanted here, as {{KEY: VALUE}} (got {error['input']!r})"
    given = (
        ""
        if isinstance(error["input"], dict | list) or SECRET_URL.search(str(error["input"]))
        else f" (got {error['input']!r})"
    )
    return f"{where or 'config'}: {error['msg'].removeprefix('Value error, ')}{given}"


def _explain_key(where: str, key: str, section: type[Section]) -> str:
    """Why a section does not take a key."""
    if key in section.refused:
        return f"{where}: not taken: {section.refused[key]}"
    known = list(section.model_fields)
    near = difflib.get_close_matches(key, [*known, *section.refused], 1, 0.5)
    if not near:
        return f"unknown key {where!r}; there are {', '.join(known)}"
    reason = section.refused.get(near[0])
    asked = f"unknown key {where!r}; did you mean {near[0]!r}?"
    return f"{asked} It is not taken: {reason}" if reason else asked


def _section_at(path: Sequence[Any]) -> type[Section]:
    """The section at a path of the schema."""
    section: type[Section] = RunConfig
    for part in path:
        if isinstance(part, str) and part in section.model_fields:
            section = section_in(section.model_fields[part].annotation) or section
    return section


def section_in(annotation: Any) -> type[Section] | None:
    """The section that a field of this type holds, if any."""
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, Section)
    ):
        return annotation
    return next((found for a in typing.get_args(annotation) if (found := section_in(a))), None)
