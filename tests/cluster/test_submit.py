"""What is handed to Slurm: the script, its options, and what is refused before it costs an allocation."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.load import load
from configs.run.folder import RunDir
from launch.submit import submit_run
from slurm.chain import chain_jobs
from slurm.submit import submit, write_script
from tests.cluster.chains import Chain, make_chain
from tests.forks import Launcher
from tests.leftovers import OF_A_JOB, OF_LAUNCHERS, OPTIONS
from tests.making import audit, config_values, run_program
from tools.sandbox.slurm import Cluster

ODD = st.text(
    st.sampled_from("ab01 '\"$`\\#%&;|<>()*?!~{}[]=,:@^üñ語\t".replace("\t", "")), min_size=1, max_size=12
).filter(lambda text: text == text.strip())


@pytest.fixture(scope="module")
def chain(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, model: Path, shards: str) -> Chain:
    return make_chain(cluster, tmp_path_factory.mktemp("submit"), model, shards, steps=6)


@settings(
    deadline=None,
    derandomize=True,
    max_examples=25,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    name=ODD,
    account=ODD,
    folder=ODD.filter(lambda name: "/" not in name and "\\" not in name and name not in (".", "..")),
)
def test_whatever_things_are_called_slurm_is_told_exactly_that(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, name: str, account: str, folder: str
) -> None:
    """The real sbatch takes job name, account and the path of the output from the script; bash takes the
    run's folder from it."""
    run = chain.faults / folder / 'it\'s "here"'
    config = load(chain.config, [])
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"name": name, "dir": run}),
            "slurm": config.slurm.model_copy(update={"account": account, "sbatch": ["--hold"]}),
        }
    )
    monkeypatch.setenv("SLURM_CONF", chain.cluster.environment["SLURM_CONF"])
    script = write_script(config, RunDir(run), chain.faults / "code")
    job = submit(script)
    told = chain.cluster.run("scontrol", "--oneliner", "show", "job", job)
    chain.cluster.run("scancel", job)
    assert f" JobName={name} UserId=" in told
    assert f" Account={account} QOS=" in told
    assert f" Command={script} WorkDir=" in told
    assert (
        f" StdOut={str(run.absolute()).replace('%', '%%')}/slurm/{job}.log " in told
    )  # a pattern, as it is shown
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("run=")]
    said = subprocess.run(
        ["bash", "-c", "\n".join([*lines, 'printf %s "$run"'])],
        capture_output=True,
        encoding="utf-8",
        check=True,
    ).stdout
    assert said == str(run.absolute())


@pytest.mark.slow
def test_the_printed_script_works_when_handed_to_sbatch_by_hand(
    chain: Chain, tmp_path: Path, launch: Launcher
) -> None:
    """Within another job, too, an array's, from a shell full of what other jobs and launchers have left. It
    writes where `status` reads."""
    folder = tmp_path / 'it\'s a "run" at 100%'
    done = chain.launch("submit", chain.config, f"run.dir={folder}", "--dry-run")
    assert done.returncode == 0 and done.stdout.startswith("#!/bin/bash"), done.stderr
    assert "2 samples each" in done.stderr and "not submitted" in done.stderr
    (tmp_path / "mine.sh").write_text(done.stdout, encoding="utf-8")
    assert not chain.jobs()
    shell = OF_LAUNCHERS | OF_A_JOB | {"SBATCH_OUTPUT": str(tmp_path / "elsewhere.log")}
    variables = shlex.join(f"{name}={value}" for name, value in shell.items())
    by_hand = f"exec env {variables} sbatch {tmp_path}/mine.sh"
    chain.cluster.run("sbatch", "--array=3", "--output=/dev/null", f"--wrap=srun sh -c '{by_hand}'")
    done_by_hand = Chain(chain.cluster, chain.config, RunDir(folder))
    assert done_by_hand.finished() == "finished"
    job = done_by_hand.job()
    assert "the chain ends: finished" in (folder / f"slurm/{job}.log").read_text(encoding="utf-8")
    expected = tmp_path / "expected"
    assert launch(chain.config, f"run.dir={expected}", procs=2).returncode == 0
    assert done_by_hand.audit() == audit(expected)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["slurm.nodes=8"], "up to 16 processes, but a step has 8 samples"),
        (["slurm.nodes=many"], "write a number of nodes, or a range as 2-8"),
        (["slurm.partition=nowhere"], "invalid partition specified: nowhere"),
        (["data.sources.0.shards=[s3://bucket/a.tar]", "slurm.setup=[]"], "~/.aws/credentials"),
        (["model.name_or_path=nobody/nothing"], "model.name_or_path: nobody/nothing"),
        (["run.dir=/proc/run"], "cannot write the run's folder"),
        ([r'run.name="a\nb"'], "control characters"),
    ],
)
def test_refused_before_it_costs_an_allocation(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], said: str
) -> None:
    monkeypatch.setenv("SLURM_CONF", chain.cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as refused:
        submit_run(load(chain.config, [f"run.dir={tmp_path}/run", *overrides]), dry_run=False)
    assert said in str(refused.value) and not chain.jobs()
    if "partition" not in said and "characters" not in said:
        assert not (tmp_path / "run/config.next.yaml").exists()


@pytest.mark.slow
def test_missing_indexes_are_made_by_a_job_without_gpus_first(
    cluster: Cluster, tmp_path: Path, model: Path, shards: str
) -> None:
    """From a shell, too, full of what other jobs and launchers have left."""
    values = config_values("run", tmp_path, model, shards, optim={"max_steps": 4}, evaluate={"captions": 0})
    values["slurm"] = {"gpus_per_node": 0, "nodes": "1-3"}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    chain = Chain(cluster, config, RunDir(tmp_path / "run"))
    done = run_program(
        "launch", "submit", config, env=cluster.environment | OF_LAUNCHERS | OF_A_JOB | OPTIONS
    )
    assert (
        done.returncode == 0
        and "indexes the shards" in done.stdout
        and "2 of 2 shards are not indexed" in done.stderr
    ), done.stderr
    assert chain.finished() == "finished"
    assert chain.audit().keys() == set(range(4))
    assert len(chain.nodes()) == 3  # a range takes what there is
    done = chain.launch("submit", config)
    assert done.returncode == 2 and "finished at step 4" in done.stderr, done.stderr


def test_a_job_that_no_node_can_take_is_told_of(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_CONF", chain.cluster.environment["SLURM_CONF"])
    submit_run(load(chain.config, [f"run.dir={tmp_path}/run", "slurm.cpus_per_task=64"]), dry_run=True)
    said = capsys.readouterr().err
    assert "node configuration is not available" in said
    assert "fewer slurm.gpus_per_node, cpus_per_task" in said


def test_a_job_that_will_not_start_as_it_is_is_told_of_at_once(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_CONF", chain.cluster.environment["SLURM_CONF"])
    chain.cluster.run("scontrol", "update", "PartitionName=high", "MaxTime=10")
    run = RunDir(tmp_path / "run")
    try:
        submit_run(load(chain.config, [f"run.dir={run.path}", "slurm.partition=high"]), dry_run=False)
        status = chain.launch("status", run.path)
    finally:
        chain.cluster.run("scancel", *chain_jobs(run))
        chain.cluster.run("scontrol", "update", "PartitionName=high", "MaxTime=UNLIMITED")
    # Slurm says so at once, and within a second which limit it is.
    said = capsys.readouterr().err
    assert re.search("waits: Partition(Config|TimeLimit): .*limit|allowed", said), said
    assert re.search("waiting: job .*: Partition(Config|TimeLimit): ", status.stdout), status.stdout
