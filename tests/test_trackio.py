"""Trackio has one run of a run, with each step once. It wants other versions of packages than CI has: it gets
an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.making import ROOT

ATTEMPTS = """
import sys
from pathlib import Path
from tests.test_trackers import draw, run_of, settings
from trainer.courier import Courier
from trainer.services import Trackio
folder = Path(sys.argv[1])
run, config = run_of(folder), settings(folder, "trackio")
for first_step, steps in ((0, range(1, 8)), (3, range(4, 11))):
    tracker = Courier("trackio", Trackio(config, run), run, first_step)
    draw(tracker, first_step, steps)
    tracker.close()
import json
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("earwitness")
print(json.dumps([name, SQLiteStorage.get_logs("earwitness", name)]))
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python with trackio, and all that this one has."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (packages / "ours.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    done = subprocess.run(
        [tmp_path / "venv/bin/pip", "install", "--quiet", "trackio"],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"pip install trackio: {done.stderr}")
    return tmp_path / "venv/bin/python"


@pytest.mark.slow
def test_trackio_gets_one_run_with_each_step_once_over_restarts(tmp_path: Path, python: Path) -> None:
    done = subprocess.run(
        [python, "-c", ATTEMPTS, tmp_path],
        cwd=ROOT,
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    name, rows = json.loads(done.stdout.splitlines()[-1])
    assert name == (tmp_path / "run/trackers/id").read_text(encoding="utf-8")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert [row["step"] for row in rows if "validation/loss" in row] == [5, 10]
    assert [row["step"] for row in rows if "restarts" in row] == [0, 3]
