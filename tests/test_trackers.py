"""A run is one run in every tracker, with each step once; a tracker that fails or is slow ends or stops no
training."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.errors import ConfigError
from configs.load import validate
from configs.run.folder import RunDir
from configs.trackers import check_network, check_trackers
from tests.making import config_values
from trainer import courier, services
from trainer.courier import Courier, Row, Service

KEY = "0123456789" * 4


def run_of(folder: Path) -> RunDir:
    run = RunDir(folder / "run")
    run.path.mkdir(exist_ok=True)
    return run


def settings(folder: Path, *trackers: str) -> Any:
    return validate(
        config_values("run", folder, Path("model"), "a.tar", monitor={"trackers": list(trackers)}), "test"
    )


def draw(tracker: Courier, first_step: int, steps: range) -> None:
    """What an attempt draws: a mark where it begins, curves at each step, and an evaluation at each fifth."""
    tracker.text("restarts", f"goes on at {first_step}", first_step)
    for step in steps:
        tracker.scalars({"loss": step / 10}, step)
        tracker.flush()
        if step % 5 == 0:
            tracker.scalars({"validation/loss": step / 100}, step)
            tracker.flush()


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """wandb as on a compute node without a network; without the package the test is skipped, but in CI it
    fails."""
    if importlib.util.find_spec("wandb") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("pip install -r requirements-dev.txt (wandb)")
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    import wandb

    wandb.teardown()  # it reads its variables once


def records(path: Path) -> Iterator[Any]:
    """What wandb has written into a file: records in blocks of 32 KiB, as LevelDB's log has them."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = -at % 2**15
        if 0 < left < 7:
            at += left
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def wandb_files(run: RunDir) -> list[Path]:
    """Oldest first."""
    return sorted(run.path.glob("wandb/*run-*/*.wandb"), key=lambda path: path.stat().st_ctime_ns)


def wandb_rows(path: Path) -> list[dict[str, Any]]:
    import wandb

    wandb.teardown()  # its own process may still be writing
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def points(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if name in row]


def test_wandb_gets_one_run_with_each_step_once_over_restarts(tmp_path: Path, wandb_offline: None) -> None:
    """The second attempt takes again what the first had told. Its folder, which takes the place of the
    first one's when it is synced, holds the whole run."""
    run, config = run_of(tmp_path), settings(tmp_path, "wandb")
    for first_step, steps in ((0, range(1, 8)), (3, range(4, 11))):
        tracker = Courier("wandb", services.Wandb(config, run), run, first_step)
        draw(tracker, first_step, steps)
        tracker.close()
    first, second = wandb_files(run)
    told = wandb_rows(second)
    assert points(wandb_rows(first), "loss") == [(step, step / 10) for step in range(1, 8)]
    assert points(told, "loss") == [(step, step / 10) for step in range(1, 11)]
    assert points(told, "validation/loss") == [(5, 0.05), (10, 0.1)]
    assert [row["_step"] for row in told] == list(range(len(told)))
    assert [row["step"] for row in told if "texts/path" in row] == [0, 3]
    runs = [record.run for path in (first, second) for record in records(path) if record.HasField("run")]
    assert {(each.run_id, each.display_name, each.project) for each in runs} == {
        ((run.trackers / "id").read_text(encoding="utf-8"), "run", "earwitness")
    }
    sent = {item.key: item.value_json for item in runs[0].config.update}
    assert json.loads(sent["optim"])["lr"] == 1e-3


def test_wandb_goes_on_offline_where_its_server_is_gone(
    tmp_path: Path, wandb_offline: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(services, "INIT_SECONDS", 1)
    run = run_of(tmp_path)
    tracker = Courier("wandb", services.Wandb(settings(tmp_path, "wandb"), run), run, 0)
    draw(tracker, 0, range(1, 4))
    tracker.close()
    assert points(wandb_rows(wandb_files(run)[-1]), "loss") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    said = capsys.readouterr().out
    assert said.count("wandb goes on offline: ") == 1 and "127.0.0.1:9" in said and "wandb sync" in said
    kept = [path for path in run.path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert not kept


class Plain:
    """A service that has what it was told, keeps it, and may fail."""

    def __init__(self, had: list[tuple[int, Row]], fails_at: int | None = None) -> None:
        self.had, self.fails_at = had, fails_at

    def begin(self, past: list[Row]) -> int:
        return len(self.had)

    def send(self, number: int, row: Row) -> None:
        if number == self.fails_at:
            raise ConnectionError("the line is down")
        self.had.append((number, row))

    def finish(self) -> None:
        pass


class Silent(Plain):
    """A service whose server takes a connection and never answers."""

    def begin(self, past: list[Row]) -> int:
        threading.Event().wait()
        return 0


def attempt(run: RunDir, service: Service, first_step: int, steps: range) -> None:
    tracker = Courier("plain", service, run, first_step)
    draw(tracker, first_step, steps)
    tracker.close()


def test_a_service_that_fails_is_told_once_and_gets_the_rest_at_the_next_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, had = run_of(tmp_path), []
    attempt(run, Plain(had, fails_at=4), 0, range(1, 8))
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith("plain failed (ConnectionError: the line is down): training goes on without it")
    assert [number for number, _ in had] == [0, 1, 2, 3]
    attempt(run, Plain(had), 5, range(6, 11))
    assert [number for number, _ in had] == list(range(len(had)))
    assert [row.step for _, row in had if "loss" in row.scalars] == list(range(1, 11))
    assert [row.step for _, row in had if "validation/loss" in row.scalars] == [5, 10]


def test_a_service_that_never_answers_stops_no_step_and_gets_all_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(courier, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(courier, "WAITING", 5)
    run, had, began = run_of(tmp_path), [], time.perf_counter()
    attempt(run, Silent(had), 0, range(1, 101))
    assert time.perf_counter() - began < 1
    assert "plain does not keep up: training goes on without it" in capsys.readouterr().out
    attempt(run, Plain(had), 100, range(101, 103))
    assert [row.step for _, row in had if "loss" in row.scalars] == list(range(1, 103))


def test_a_disk_that_takes_nothing_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path)
    (run.trackers).write_text("in the way", encoding="utf-8")
    attempt(run, Plain([]), 0, range(1, 4))
    said = capsys.readouterr().out
    assert said.count("plain is not told for now, training goes on") == 1 and str(run.trackers) in said


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "wandb has no key for api.wandb.ai: type `wandb login`"),
        ({"WANDB_MODE": "offline"}, ""),
        ({"WANDB_API_KEY": KEY}, ""),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, ""),
    ],
)
def test_wandb_without_a_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    (tmp_path / "netrc").write_text(
        f"machine wandb.example.org login user password {KEY}\n", encoding="utf-8"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=name))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"NETRC": str(tmp_path / "netrc")}).items():
        monkeypatch.setenv(name, value)
    if not words:
        return check_trackers(["tensorboard", "wandb"])
    with pytest.raises(ConfigError, match=words):
        check_trackers(["tensorboard", "wandb"])


def test_settings_that_hold_secrets_or_places_are_shown_to_nobody(tmp_path: Path) -> None:
    values = config_values("run", tmp_path, Path("model"), "s3://the-bucket/a.tar", optim={"lr": 0.25})
    values["slurm"] = {"notify": "https://hooks.example.org/T0/secret", "setup": ["export TOKEN=secret"]}
    told = json.dumps(services.shown(validate(values, "test")))
    assert '"lr": 0.25' in told and '"name": "sounds"' in told
    assert not [word for word in ("secret", "the-bucket", str(tmp_path)) if word in told]


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is called so is none."""
    found = {"tensorboard": SimpleNamespace(origin="here"), "trackio": SimpleNamespace(origin=None)}
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    with pytest.raises(ConfigError, match="trackio is not installed in this Python: `pip install trackio`"):
        check_trackers(["tensorboard", "trackio"])


def test_a_server_that_cannot_be_reached_is_refused_before_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "WANDB_MODE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", url)
        with pytest.raises(ConfigError, match=r"wandb cannot reach 127.*WANDB_MODE=offline"):
            check_network(["wandb"])
        server.listen()
        check_network(["wandb"])
