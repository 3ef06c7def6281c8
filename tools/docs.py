"""`python -m tools.docs`: writes docs/configuration.md and configs/schema.json (for editors) from
configs/schema.py."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from configs.errors import run_command
from configs.load import section_in
from configs.schema import RunConfig, Section
from trainer.changes import marks

ROOT = Path(__file__).parents[1]
GUIDE, SCHEMA = ROOT / "docs/configuration.md", ROOT / "configs/schema.json"
OPENING = """# Configuration

This page is made from `configs/schema.py` by `python -m tools.docs`; change it there. `python -m launch
config CONFIG [key=value ...]` prints all settings of a run, resolved.

A config is a YAML file with the sections below. With `extends: other.yaml` it begins with the settings of
another file, whose path is relative to this one: sections are merged, key by key; lists and values are
replaced. On the command line `optim.lr=1e-5` overrides a key; an item of a list is named by its `name` or
number: `data.sources.speech.weight=2`. An unknown key is refused, and the nearest known one is named. The
last column says whether a run that has begun may go on with another value ([resume.md](resume.md)). Editors
that know YAML schemas (VS Code with the YAML extension, JetBrains) complete and check keys; the line
`# yaml-language-server: $schema=schema.json` in each file of `configs/` tells them the schema.
"""


def main() -> None:
    """Write both files."""
    for path, text in ((GUIDE, guide()), (SCHEMA, editor_schema())):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


def guide() -> str:
    """docs/configuration.md: a table of keys for each section."""
    return "\n".join([OPENING, *_tables(RunConfig, "")])


def _tables(section: type[Section], at: str) -> Iterator[str]:
    """The table of a section, then those of the sections in it. at: its key, as `data.sources[]`."""
    inner: dict[str, type[Section]] = {}
    rows: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        inner_section = section_in(field.annotation)
        if inner_section is not None:
            inner[name] = inner_section
        if inner_section is None or field.description:
            rows[name] = field
    if at and rows:
        yield f"## {at}\n\n{section.__doc__}\n"
        yield "| key | value | default | | may change |\n|---|---|---|---|---|"
        changes = marks(section)
        for name, field in rows.items():
            description, change = _cell(field.description or ""), changes[name].value
            yield f"| `{name}` | {_kind(field)} | {_default(field)} | {description} | {change} |"
        yield ""
    for name, inner_section in inner.items():
        is_list = typing.get_origin(section.model_fields[name].annotation) is list
        key = f"{name}[]" if is_list else name
        yield from _tables(inner_section, f"{at}.{key}" if at else key)


def _kind(field: FieldInfo) -> str:
    """The type of a value, and its limits."""
    parts = [_type(field.annotation)]
    for limit in field.metadata:
        match limit:
            case Ge(ge=number):
                parts.append(f"≥ {number}")
            case Gt(gt=number):
                parts.append(f"> {number}")
            case Le(le=number):
                parts.append(f"≤ {number}")
            case Lt(lt=number):
                parts.append(f"< {number}")
            case MultipleOf(multiple_of=number):
                parts.append(f"a multiple of {number}")
            case MinLen():
                parts.append("not empty")
    return _cell(", ".join(parts))


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type(argument) for argument in arguments if argument is not types.NoneType)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} numbers"
    if origin is dict or section_in(annotation):
        return "mapping"
    return {str: "text", int: "integer", float: "number", bool: "`true` or `false`", Path: "path"}[annotation]


def _default(field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "**required**"
    if value is None or isinstance(value, BaseModel):
        return ""
    text = str(value) if isinstance(value, Path) else json.dumps(value)
    return f"`{text}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def editor_schema() -> str:
    """configs/schema.json: a JSON schema of a config file. Few keys are required, as the file that a config
    extends may have them."""
    schema = RunConfig.model_json_schema()
    for definition in (schema, *schema["$defs"].values()):
        if definition["title"] != "Source":
            definition.pop("required", None)
        for field in definition["properties"].values():
            if "description" in field:
                field["description"] = field["description"].replace("\n", " ")
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "Another config, relative to this one, that this one changes.",
    }
    source = schema["$defs"]["Source"]["properties"]
    source["shards"] = {
        "anyOf": [{"type": "string"}, source["shards"]],
        "description": source["shards"].pop("description"),
    }
    source["validation"] = {
        "anyOf": [{"type": "number", "minimum": 0, "exclusiveMaximum": 1}, source["validation"]]
    }
    micro_seconds = schema["$defs"]["Batch"]["properties"]["micro_seconds"]
    micro_seconds["anyOf"] = [{"const": "auto"}, {"type": "number", "exclusiveMinimum": 0}]
    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    run_command(main)
