"""The shell that submits does not become the job's: no key for S3 leaves it, and nothing of another job or
launcher."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from configs.load import validate
from configs.run.folder import RunDir
from configs.schema import RunConfig
from slurm import cluster, submit
from slurm.shell import heed
from tests.leftovers import LEFTOVERS, NO_EXPORT, OPTIONS
from tests.making import config_values

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
COMMANDS = ("sbatch", "scontrol", "scancel", "sacct", "squeue", "srun", "sinfo")
OF_EVERY_JOB = {"SLURM_NTASKS_PER_NODE", "SLURM_PROCID"}
"""What Slurm sets anew for each job with the options of these scripts."""


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
    monkeypatch.setenv("SLURM_CLUSTERS", "second")
    for name, value in LEFTOVERS.items() | {(name, f"of the shell: {name}") for name in KEYS}:
        monkeypatch.setenv(name, value)
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
    assert not set(LEFTOVERS) & set(environment(seen / "sbatch"))
    for kept in ("AWS_ENDPOINT_URL=http://store:9000", "SLURM_CONF=/etc/slurm.conf", "SLURM_CLUSTERS=second"):
        assert text.count(kept) == 2


@pytest.mark.parametrize("kind", ["of ranks", "of an index"])
def test_a_job_has_no_key_of_the_shell_that_submitted_it(
    tmp_path: Path, config: RunConfig, seen: Path, kind: str
) -> None:
    """By its script alone, as it is printed for `sbatch` by hand; nor has the job that it queues."""
    run = RunDir(config.run.dir)
    make = submit.script_text if kind == "of ranks" else submit.index_script
    subprocess.run(["bash", "-c", make(config, run, tmp_path)], check=False, timeout=60)
    handed_on = environment(seen / "job")
    assert not {*KEYS, *LEFTOVERS, "SLURM_CLUSTERS"} & set(handed_on) - OF_EVERY_JOB
    assert handed_on["AWS_ENDPOINT_URL"] == "http://store:9000"
    if kind == "of ranks":
        assert not {*KEYS, *LEFTOVERS} & set(environment(seen / "sbatch"))


@pytest.mark.parametrize("kind", ["of ranks", "of an index"])
def test_what_the_setup_lines_export_reaches_the_ranks(
    tmp_path: Path, config: RunConfig, seen: Path, kind: str
) -> None:
    """Whatever the site says of srun: by its option."""
    setup = ["export NCCL_DEBUG=INFO CUDA_VISIBLE_DEVICES=1"]
    config = config.model_copy(update={"slurm": config.slurm.model_copy(update={"setup": setup})})
    make = submit.script_text if kind == "of ranks" else submit.index_script
    (seen.parent / "commands/srun").write_text(
        f'#!/bin/sh\nenv >"{seen}/rank"\necho "$@" >>"{seen}/said"\n', encoding="utf-8"
    )
    script = make(config, RunDir(config.run.dir), tmp_path)
    subprocess.run(["bash", "-c", script], stdout=subprocess.DEVNULL, check=False, timeout=60)
    assert environment(seen / "rank").items() >= {("NCCL_DEBUG", "INFO"), ("CUDA_VISIBLE_DEVICES", "1")}
    assert all(
        line.startswith("--export=ALL ") for line in (seen / "said").read_text(encoding="utf-8").splitlines()
    )


def test_a_job_keeps_what_its_own_options_say_to_srun(
    tmp_path: Path, config: RunConfig, seen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sbatch sets it; a variable of the same name is a leftover where there is no such option."""
    monkeypatch.setenv("SLURM_HINT", "nomultithread")
    asked = {"cpus_per_task": 3, "sbatch": ["--hint=nomultithread"]}
    config = config.model_copy(update={"slurm": config.slurm.model_copy(update=asked)})
    script = submit.script_text(config, RunDir(config.run.dir), tmp_path)
    subprocess.run(["bash", "-c", script], stdout=subprocess.DEVNULL, check=False, timeout=60)
    handed_on = environment(seen / "job")
    assert (handed_on["SLURM_HINT"], handed_on["SLURM_CPUS_PER_TASK"]) == ("nomultithread", "3")


def test_a_job_of_an_array_says_that_a_chain_is_one_job(
    tmp_path: Path, config: RunConfig, seen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    script = submit.script_text(config, RunDir(config.run.dir), tmp_path)
    scontrol = seen.parent / "commands/scontrol"
    for answer, code in (("JobId=6 ArrayJobId=6 ArrayTaskId=0 JobName=run", 2), ("JobId=6 JobName=run", 1)):
        scontrol.write_text(f"#!/bin/sh\necho {answer}\n", encoding="utf-8")
        done = subprocess.run(["bash", "-c", script], capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == code
        assert ("Type: env -u SBATCH_ARRAY_INX sbatch" in done.stdout) == (code == 2)


def test_the_account_of_a_site_is_taken_and_other_options_are_told(config: RunConfig) -> None:
    """As SBATCH_ACCOUNT in ~/.bashrc; a chain has it in its script, so that every job has it."""
    shell = OPTIONS | NO_EXPORT | {"SBATCH_ACCOUNT": "p1", "SBATCH_QOS": "long"}
    settings, (account, rest) = heed(config.slurm.model_copy(update={"qos": "short"}), shell)
    assert (settings.account, settings.qos) == ("p1", "short")
    assert account.startswith("slurm.account=p1, by SBATCH_ACCOUNT of this shell")
    assert rest.startswith(
        "not heeded: SBATCH_ARRAY_INX, SBATCH_EXPORT, SBATCH_OUTPUT, SBATCH_QOS, SBATCH_TIME"
    )


def test_slurms_commands_are_asked_what_is_meant_whatever_the_shell_prefers(seen: Path) -> None:
    """SQUEUE_STATES would hide a waiting chain, which would then be submitted twice."""
    cluster.queued(["7"])
    cluster.cancel("7")
    assert not set(LEFTOVERS) & set(environment(seen / "squeue"))
    assert not set(LEFTOVERS) & set(environment(seen / "scancel"))
