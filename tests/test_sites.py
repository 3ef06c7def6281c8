"""What sites' Slurm says, and does: to a submission, to the job after this one, to a job that waits."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from configs.errors import ConfigError, EarwitnessError
from configs.load import dump, validate
from configs.run.folder import RunDir
from configs.schema import RunConfig
from launch.doctor import _config
from slurm import submit
from slurm.job import join_job
from slurm.said import refused_successor
from slurm.sayings import advice, table
from tests.making import ROOT, config_values

VIOLATES = (
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's"
    " size and/or time limits)"
)
LIMITED = f"sbatch: error: QOSMaxSubmitJobPerUserLimit\n{VIOLATES}"
TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
REFUSED_BY_SITE = """sbatch: error: This cluster wants a memory request, see
sbatch: error:   https://docs.example/slurm#memory
sbatch: error: Batch job submission failed: Unspecified error"""


@pytest.mark.parametrize(
    ("said", "setting"),
    [
        (LIMITED, "slurm.resubmit: requeue"),
        (f"sbatch: error: AssocMaxSubmitJobLimit\n{VIOLATES}", "slurm.resubmit: requeue"),
        (f"sbatch: error: QOSMaxWallDurationPerJobLimit\n{VIOLATES}", "slurm.time_minutes"),
        ("QOSMaxWallDurationPerJobLimit", "slurm.time_minutes"),
        ("PartitionTimeLimit", "slurm.time_minutes"),
        ("QOSMaxNodePerJobLimit", "slurm.nodes"),
        ("PartitionNodeLimit", "slurm.nodes"),
        ("AssocGrpCPUMinutesLimit", "slurm.account"),
        ("Job's account not permitted to use this partition (low allows other not lab)", "slurm.account"),
        ("Invalid account or account/partition combination specified", "slurm.account"),
        ("Invalid qos specification", "slurm.qos"),
        ("PartitionDown", "slurm.partition"),
        ("Required partition not available (inactive or drain)", "slurm.partition"),
        ("No partition specified or system default partition", "slurm.partition"),
        ("Memory required by task is not available", "slurm.memory_gb"),
        ("Invalid feature specification", "slurm.constraint"),
        ("Requested reservation is invalid", "slurm.reservation"),
        ("allocation failure: Requested node configuration is not available", "slurm.gpus_per_node"),
        ("Nodes required for job are DOWN, DRAINED or reserved for jobs in higher", "sinfo -R"),
        (REFUSED_BY_SITE, "slurm.sbatch"),
    ],
)
def test_what_slurm_has_said_comes_with_the_setting_that_mends_it(said: str, setting: str) -> None:
    assert setting in advice(said)


@pytest.mark.parametrize("reason", ["None", "Resources", "Priority", "Dependency", "BeginTime", "Licenses"])
def test_a_job_that_waits_as_jobs_do_needs_no_advice(reason: str) -> None:
    assert not advice(reason)


def test_the_guide_has_all_that_slurm_says() -> None:
    assert table() in (ROOT / "docs/slurm.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("address", ["fd00::7", "[fd00::7]"])
def test_ranks_meet_at_an_ipv6_address(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    variables = {
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_LAUNCH_NODE_IPADDR": address,
    }
    monkeypatch.setattr(os, "environ", variables)
    join_job()
    assert os.environ["MASTER_ADDR"] == "fd00::7"


class Site:
    """Slurm's commands, which are not the real ones, and a run."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.commands = folder / "commands"
        self.commands.mkdir()
        for name in ("sbatch", "scontrol", "sacct", "squeue", "srun", "sinfo", "scancel"):
            self.command(name, "")
        values = config_values("run", folder, model, "x.tar")
        # The job ends when it comes to the user's lines.
        values["slurm"] = {"nodes": 1, "gpus_per_node": 0, "setup": ['echo "resubmit: $resubmit"', "exit 0"]}
        self.config: RunConfig = validate(values, "test")
        self.run = RunDir(self.config.run.dir)
        self.script = submit.write_script(self.config, self.run, folder)

    def command(self, name: str, body: str) -> None:
        (self.commands / name).write_text(f'#!/bin/bash\necho "$*" >>$0.calls\n{body}\n', encoding="utf-8")
        (self.commands / name).chmod(0o755)

    def sbatch_fails(self, said: str) -> None:
        self.command("sbatch", f"cat >&2 <<'END'\n{said}\nEND\nexit 1")

    def calls(self, name: str) -> list[str]:
        file = self.commands / f"{name}.calls"
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []

    def job(self) -> str:
        """What a job, number 45, says until it comes to the user's lines."""
        variables = {"SLURM_JOB_ID": "45", "SLURMD_NODENAME": "n1", "SLURM_JOB_PARTITION": "low"}
        log = self.run.slurm / "45.log"
        with log.open("w", encoding="utf-8") as output:
            command = ["bash", self.script]
            subprocess.run(
                command, env=os.environ | variables, stdout=output, stderr=output, timeout=30, check=False
            )
        return log.read_text(encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    site = Site(tmp_path, model)
    monkeypatch.setenv("PATH", f"{site.commands}:{os.environ['PATH']}")
    return site


def test_all_that_the_site_says_of_a_refusal_is_shown_once(
    site: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    site.sbatch_fails(REFUSED_BY_SITE)
    with pytest.raises(ConfigError) as error:
        submit.submit(site.script)
    assert REFUSED_BY_SITE in str(error.value) and capfd.readouterr().err == ""


def test_what_the_site_says_of_a_job_that_it_takes_is_shown(
    site: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also by a wrapper around sbatch, which prints before the number."""
    body = "echo '--> Verifying 2 nodes...OK'; echo '45;cluster'; echo 'sbatch: to partition high' >&2"
    site.command("sbatch", body)
    assert submit.submit(site.script) == "45"
    assert "to partition high" in capfd.readouterr().err


def test_slurm_that_does_not_answer_is_no_error_of_the_config(site: Site) -> None:
    site.sbatch_fails(TIMED_OUT)
    with pytest.raises(EarwitnessError, match="squeue --me") as error:
        submit.submit(site.script)
    assert error.value.exit_code == 1


@pytest.mark.parametrize("said", [LIMITED, REFUSED_BY_SITE], ids=["limit", "site"])
def test_a_job_whose_successor_is_refused_requeues_itself_without_waiting(site: Site, said: str) -> None:
    site.sbatch_fails(said)
    output = site.job()
    assert said in output and "requeues itself instead" in output and "resubmit: requeue" in output
    assert len(site.calls("sbatch")) == 1
    assert refused_successor(site.run, "45") == " ".join(said.split())


def test_where_there_is_no_sbatch_a_job_requeues_itself(site: Site) -> None:
    (site.commands / "sbatch").write_text("#!/nowhere/interpreter\n", encoding="utf-8")
    output = site.job()
    assert "requeues itself instead" in output and "resubmit: requeue" in output


def test_an_answer_that_was_lost_makes_no_second_successor(site: Site) -> None:
    """Slurm had taken the job twice; what waits for another one, or is no job of the chain, stays."""
    site.sbatch_fails(TIMED_OUT)
    queue = [
        "44 afternotok:45(unfulfilled) /home/me/clean_up.sh",
        f"46 afternotok:45(unfulfilled) {site.script}",
        f"47 afternotok:45 {site.script} 45 45",
        f"48 afternotok:456 {site.script}",
    ]
    site.command("squeue", "\n".join(f"echo '{line}'" for line in queue))
    assert "resubmit: chain" in site.job()
    assert (site.run.slurm / "jobs/45.next").read_text(encoding="utf-8") == "46\n"
    assert site.calls("scancel") == ["47"]


def test_a_wrapper_that_prints_before_the_number_queues_the_successor(site: Site) -> None:
    site.command("sbatch", "echo 'Welcome to the 2nd cluster'; echo '46;cluster'")
    assert "resubmit: chain" in site.job()
    assert (site.run.slurm / "jobs/45.next").read_text(encoding="utf-8") == "46\n"


def test_a_job_whose_successor_was_cancelled_and_is_refused_says_that_the_chain_ends(site: Site) -> None:
    """Slurm does not let it requeue itself: while there was a successor, both would have gone on."""
    site.config.slurm.setup.clear()
    submit.write_script(site.config, site.run, site.script.parent)
    site.command("sbatch", "if [ $(wc -l <$0.calls) = 1 ]; then echo 46; else echo refused >&2; exit 1; fi")
    site.command("srun", "case $* in *launch.attempt*) echo go 0 - 0 ;; *) exit 1 ;; esac")
    site.command("scontrol", "echo JobState=RUNNING")
    output = site.job()
    assert "the ranks ended with code 1" in output and "the chain ends here: `launch submit`" in output
    assert "requeues itself" not in output


def test_the_doctor_asks_for_the_job_that_a_submission_would(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the account that people have in their shell."""
    path = tmp_path / "mine.yaml"
    path.write_text(dump(site.config), encoding="utf-8")
    site.command(
        "sbatch", 'grep -q account=p1 "$2" || { echo "sbatch: error: Invalid account" >&2; exit 1; }'
    )
    verdicts = {finding.what: finding.verdict for finding in _config(path)}
    assert verdicts["job"] == "bad"
    monkeypatch.setenv("SBATCH_ACCOUNT", "p1")
    verdicts = {finding.what: finding.verdict for finding in _config(path)}
    assert (verdicts["job"], verdicts["shell"]) == ("ok", "note")
