"""The pages that are made from the schema are as the schema is, and editors get the same verdict on a config
as the program."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from configs.errors import ConfigError
from configs.load import load
from configs.run.events import KINDS, Event
from tests.making import ROOT
from tools import docs

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def editor() -> Draft202012Validator:
    """What an editor checks a config with."""
    return Draft202012Validator(json.loads(docs.SCHEMA.read_text(encoding="utf-8")))


def test_the_pages_are_current() -> None:
    advice = "run `python -m tools.docs` and commit what it writes"
    assert docs.GUIDE.read_text(encoding="utf-8") == docs.guide(), advice
    assert docs.SCHEMA.read_text(encoding="utf-8") == docs.editor_schema(), advice


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_guide_names_every_event_of_the_ledger_and_its_fields(kind: type[Event]) -> None:
    guide = (ROOT / "docs/resume.md").read_text(encoding="utf-8")
    rows = [
        line for line in guide.splitlines() if line.startswith("|") and f"`{kind.name}`" in line.split("|")[1]
    ]
    fields = {field.name for field in dataclasses.fields(kind)} - {"attempt", "time"}
    assert len(rows) == 1 and not [field for field in fields if f"`{field}`" not in rows[0]]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_editors_find_the_schema_and_accept_our_configs(path: Path) -> None:
    schema = "../" * (len(path.relative_to(docs.SCHEMA.parent).parts) - 1) + docs.SCHEMA.name
    assert f"# yaml-language-server: $schema={schema}\n" in path.read_text(encoding="utf-8")
    editor().validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "text",
    [
        "optim: {lrr: 1}",
        "batch: {micro_seconds: 0}",
        "data: {sources: [{name: a}]}",
        "data: {sources: [{name: a, shards: b, validation: 2}]}",
        "extends: 3",
        "x: 1",
    ],
)
def test_editors_mark_what_the_program_refuses(tmp_path: Path, text: str) -> None:
    assert list(editor().iter_errors(yaml.safe_load(text)))
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        load(tmp_path / "mine.yaml")


def test_editors_accept_a_part_that_extends_another_file() -> None:
    part = yaml.safe_load(
        "data: {sources: [{name: a, shards: b.tar, validation: 0.01}]}\nextends: turbo.yaml"
    )
    editor().validate(part)
