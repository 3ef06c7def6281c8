"""The pages that are made from the schema are as the schema is, and editors get the same verdict on a config as the program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.making import ROOT, run_program

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SCHEMA = ROOT / "configs/schema.json"


def test_the_pages_are_current() -> None:
    before = {path: path.read_text() for path in (ROOT / "docs/configuration.md", SCHEMA)}
    assert run_program("tools.docs").returncode == 0
    after = {path: path.read_text() for path in before}
    for path, text in before.items():
        path.write_text(text)
    assert before == after, "run `python -m tools.docs` and commit what it writes"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_editors_find_the_schema_and_accept_our_configs(path: Path) -> None:
    assert "# yaml-language-server: $schema=schema.json\n" in path.read_text()
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    "text",
    [
        "optim: {lrr: 1}",
        "batch: {micro_size: 0}",
        "data: {sources: [{name: a}]}",
        "data: {sources: [{name: a, shards: b, validation: 2}]}",
        "extends: 3",
        "x: 1",
    ],
)
def test_editors_mark_what_the_program_refuses(text: str) -> None:
    validator = Draft202012Validator(json.loads(SCHEMA.read_text()))
    assert list(validator.iter_errors(yaml.safe_load(text)))
    assert not list(validator.iter_errors(yaml.safe_load("data: {sources: [{name: a, shards: b.tar, validation: 0.01}]}\nextends: turbo.yaml")))
