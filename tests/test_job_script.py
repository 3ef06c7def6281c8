"""No key for S3 leaves the shell that submits: not to sbatch, not into a job, not to the job after it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from configs.load import validate
from configs.run.folder import RunDir
from configs.schema import RunConfig
from slurm import submit
from tests.making import config_values

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
COMMANDS = ("sbatch", "scontrol", "sacct", "squeue", "srun", "sinfo")


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where Slurm's commands, which are not the real ones, leave the environment that they see, and
    a shell with keys in it."""
    commands, seen = tmp_path / "commands", tmp_path / "seen"
    commands.mkdir()
    seen.mkdir()
    for name in COMMANDS:
        (commands / name).write_text(
            f"#!/bin/sh\nenv >>'{seen}/{name}'\necho Submitted batch job 7\n", encoding="utf-8"
        )
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    for name in KEYS:
        monkeypatch.setenv(name, f"of the shell: {name}")
    return seen


@pytest.fixture
def config(tmp_path: Path, model: Path, seen: Path) -> RunConfig:
    """A run whose jobs leave their environment and end when they come to the user's lines."""
    values = config_values("run", tmp_path, model, "x.tar")
    values["slurm"] = {"nodes": 1, "gpus_per_node": 0, "setup": [f"env >'{seen}/job'", "exit 0"]}
    return validate(values, "test")


def environment(file: Path) -> dict[str, str]:
    """What was seen last."""
    return dict(line.split("=", 1) for line in file.read_text(encoding="utf-8").splitlines() if "=" in line)


def test_sbatch_is_handed_no_key_and_nothing_of_the_job_around_it(
    tmp_path: Path, config: RunConfig, seen: Path
) -> None:
    before = dict(os.environ)
    script = submit.write_script(config, RunDir(config.run.dir), tmp_path)
    assert submit.submit(script) == "7"
    submit.look_ahead(script)
    assert os.environ == before
    text = (seen / "sbatch").read_text(encoding="utf-8")
    assert "of the shell" not in text and "SLURM_JOB_ID" not in text
    assert text.count("AWS_ENDPOINT_URL=http://store:9000") == text.count("SLURM_CONF=/etc/slurm.conf") == 2


@pytest.mark.parametrize("kind", ["of ranks", "of an index"])
def test_a_job_has_no_key_of_the_shell_that_submitted_it(
    tmp_path: Path, config: RunConfig, seen: Path, kind: str
) -> None:
    """By its script alone, as it is printed for `sbatch` by hand; nor has the job that it queues."""
    run = RunDir(config.run.dir)
    make = submit.script_text if kind == "of ranks" else submit.index_script
    subprocess.run(["bash", "-c", make(config, run, tmp_path)], check=False, timeout=60)
    handed_on = environment(seen / "job")
    assert not set(KEYS) & set(handed_on)
    assert handed_on["AWS_ENDPOINT_URL"] == "http://store:9000"
    if kind == "of ranks":
        assert "of the shell" not in (seen / "sbatch").read_text(encoding="utf-8")
