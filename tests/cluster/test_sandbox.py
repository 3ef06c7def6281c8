"""The sandbox's Slurm is a real one that can be broken on purpose, and nothing of it stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from configs.errors import EarwitnessError
from tests.cluster.conftest import need_packages
from tests.making import run_program
from tools.sandbox import slurm

pytestmark = pytest.mark.usefixtures("slurm_packages")


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


def submit(cluster: slurm.Cluster, *arguments: str, wrap: str = "exec sleep 1000") -> str:
    """The job's number; what it prints lies in FOLDER/JOB.out."""
    said = cluster.run(
        "sbatch", "--parsable", f"--output={cluster.folder}/%j.out", *arguments, f"--wrap={wrap}"
    )
    return said.strip()


def state(cluster: slurm.Cluster, job: str) -> str:
    return re.findall(r"JobState=(\w+)", cluster.run("scontrol", "show", "job", job))[0]


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that carry the folder in them or in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (
                (process / name).read_bytes().replace(b"\0", b" ") for name in ("cmdline", "environ")
            )
        except OSError:
            continue
        if str(folder).encode() in command + environment:
            found.append(f"{process.name} {command.decode()}")
    return found


def sleeps(cluster: slurm.Cluster) -> list[str]:
    return sorted(
        found[0]
        for line in processes_of(cluster.folder)
        if (found := re.findall(r"^\d+ (/bin/sleep \d{4})", line))
    )


def test_a_job_runs_on_two_nodes_with_two_tasks_each(cluster: slurm.Cluster) -> None:
    job = submit(
        cluster, "-N2", "--ntasks-per-node=2", wrap="srun /bin/sh -c 'echo $SLURMD_NODENAME $SLURM_PROCID'"
    )
    wait_until(lambda: state(cluster, job) == "COMPLETED")
    printed = sorted(
        line.split() for line in (cluster.folder / f"{job}.out").read_text(encoding="utf-8").splitlines()
    )
    assert [rank for _, rank in printed] == ["0", "1", "2", "3"]
    first, second = printed[0][0], printed[2][0]
    assert [node for node, _ in printed] == [first, first, second, second] and first != second


def test_jobs_get_the_gpus_that_they_ask_for(cluster: slurm.Cluster) -> None:
    assert cluster.run("srun", "--gres=gpu:2", "/bin/sh", "-c", "echo $CUDA_VISIBLE_DEVICES") == "0,1\n"
    with pytest.raises(EarwitnessError, match="not available"):
        cluster.run("srun", "--gres=gpu:3", "/bin/true")


def test_a_job_in_high_preempts_one_in_low(cluster: slurm.Cluster) -> None:
    low = submit(
        cluster, "-N4", "--exclusive", wrap="trap 'echo warned; exit' TERM; while :; do sleep 0.1; done"
    )
    wait_until(lambda: state(cluster, low) == "RUNNING")
    high = submit(cluster, "-phigh", "-N2", "--exclusive", wrap="true")
    wait_until(lambda: state(cluster, high) == "COMPLETED")
    wait_until(lambda: state(cluster, low) == "PENDING")
    assert "Restarts=1 " in cluster.run("scontrol", "show", "job", low)
    assert "warned" in (cluster.folder / f"{low}.out").read_text(encoding="utf-8")
    cluster.run("scancel", low)


def test_without_accounting_sacct_fails(cluster: slurm.Cluster) -> None:
    with pytest.raises(EarwitnessError, match="disabled"):
        cluster.run("sacct")


@pytest.mark.slow
def test_slurm_requeues_the_job_of_a_node_that_lost_power_and_takes_the_node_back(tmp_path: Path) -> None:
    with slurm.serve(
        tmp_path / "c", 2, extra=["SlurmdTimeout=3", "MessageTimeout=3"]
    ) as cluster:  # 12 s; 49 s with the defaults, 30 and 10
        job = submit(cluster, "-N2", wrap="exec srun /bin/sleep 1000")
        wait_until(lambda: sleeps(cluster) == ["/bin/sleep 1000"] * 2)
        cluster.kill_node("n1")
        wait_until(lambda: state(cluster, job) == "PENDING")
        assert "down" in cluster.run("sinfo", "-hn", "n1", "-o", "%t")
        cluster.start_slurmd("n1")
        assert cluster.run("srun", "-w", "n1", "/bin/echo", "back") == "back\n"
        wait_until(lambda: not sleeps(cluster))


def test_jobs_survive_the_death_of_slurmd_but_not_of_their_node(tmp_path: Path) -> None:
    with slurm.serve(tmp_path / "c", 2) as cluster:
        finished, out = cluster.folder / "finished", cluster.folder / "1.out"
        job = submit(
            cluster,
            "-wn1",
            wrap=(
                f"echo began; until [ -e {finished} ]; do /bin/sleep 0.1; done; echo survived; exec"
                " /bin/sleep 1001"
            ),
        )
        submit(cluster, "-wn2", wrap="exec /bin/sleep 1002")
        wait_until(lambda: out.exists() and out.read_text(encoding="utf-8") == "began\n")
        cluster.kill_slurmd("n1")
        finished.touch()
        wait_until(lambda: out.read_text(encoding="utf-8") == "began\nsurvived\n")
        cluster.start_slurmd("n1")
        wait_until(lambda: sleeps(cluster) == ["/bin/sleep 1001", "/bin/sleep 1002"])
        assert state(cluster, job) == "RUNNING"
        cluster.kill_node("n1")
        assert sleeps(cluster) == ["/bin/sleep 1002"]


def test_after_stop_nothing_is_left_whatever_died_before(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    with ExitStack() as stack:
        with pytest.raises(KeyboardInterrupt), slurm.serve(folder, 2) as cluster:
            submit(
                cluster, "-N2", wrap="trap '' TERM; setsid /bin/sleep 1000 & wait"
            )  # an orphan that hears no signal
            wait_until(lambda: sleeps(cluster))
            shell = os.environ | cluster.environment
            commands = [
                "srun /bin/sleep 1001",
                "srun -N3 true",
                "sbatch --wait --wrap=true -dafter:1",
                "/bin/sleep 1002",
            ]
            *waiting, bystander = (
                stack.enter_context(subprocess.Popen(one.split(), env=shell, stderr=subprocess.DEVNULL))
                for one in commands
            )
            stack.callback(bystander.kill)
            os.kill(int((folder / "slurmctld.pid").read_text(encoding="utf-8")), signal.SIGKILL)
            cluster.kill_slurmd("n1")
            raise KeyboardInterrupt
        assert all(process.wait(10) for process in waiting)
        assert bystander.poll() is None, "a shell that exports SLURM_CONF would have died"
    assert not processes_of(folder) and not folder.exists()
    slurm.stop(folder)


def test_clusters_side_by_side_do_not_mix(cluster: slurm.Cluster, tmp_path: Path) -> None:
    wait_until(lambda: not cluster.run("squeue", "-ho", "%j"))  # of the tests before
    mine = submit(cluster, "--job-name=mine")
    with slurm.serve(tmp_path / "other", 1) as other:
        theirs = submit(other, "--job-name=theirs")
        wait_until(lambda: state(cluster, mine) == state(other, theirs) == "RUNNING")
        assert cluster.run("squeue", "-ho", "%j").split() == ["mine"] and other.run(
            "squeue", "-ho", "%j"
        ).split() == ["theirs"]
        other.kill_node("n1")
    assert state(cluster, mine) == "RUNNING"
    assert cluster.run("srun", "-N4", "/bin/echo", "well") == "well\n" * 4
    cluster.run("scancel", mine)


def test_the_command_line_starts_one_says_what_to_type_and_stops_it(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    started = run_program("tools.sandbox", "slurm", "--nodes", 1, "--dir", folder)
    try:
        assert started.returncode == 0, started.stderr
        typed = re.findall(r"export (\w+)=(\S+)", started.stdout)
        listed = subprocess.run(
            ["sinfo", "-hNo%N"],
            env=os.environ | dict(typed),
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        assert set(listed.stdout.split()) == {"n1"}
        again = run_program("tools.sandbox", "slurm", "--nodes", 1, "--dir", folder)
        assert (
            again.returncode == 1
            and f"python -m tools.sandbox stop {folder}" in again.stderr
            and processes_of(folder)
        )
        stop = re.findall(r"python -m (tools.sandbox) (stop) (.*)", started.stdout)[0]
        assert run_program(*stop).returncode == 0
    finally:
        slurm.stop(folder)
    assert not processes_of(folder) and not folder.exists()


@pytest.mark.parametrize("conf", [None, "ClusterName=real\n"])
def test_stop_touches_no_folder_that_is_no_sandbox(tmp_path: Path, conf: str | None) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    if conf:
        (tmp_path / "slurm.conf").write_text(conf, encoding="utf-8")
    with pytest.raises(EarwitnessError, match="nothing is stopped or removed"):
        slurm.stop(tmp_path)
    with pytest.raises(EarwitnessError, match="there already"):
        slurm.start(tmp_path)
    assert (tmp_path / "thesis.tex").read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize(
    ("name", "words"), [("my cluster", "letters, digits"), ("long" * 30, "80 characters")]
)
def test_a_folder_that_slurm_cannot_take_is_refused(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(EarwitnessError, match=words):
        slurm.start(tmp_path / name)
    assert not (tmp_path / name).exists()


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(slurm.PACKAGES, "no-such-daemon", "no-such-package")
    with pytest.raises(EarwitnessError, match=r"apt-get install -y --no-install-recommends no-such-package$"):
        slurm.start(tmp_path / "c")


def test_a_daemon_that_does_not_start_is_quoted_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(EarwitnessError, match=r"(?s)slurmctld did not start.*NoSuchSetting"):
        slurm.start(tmp_path / "c", extra=["NoSuchSetting=1"])
    assert not processes_of(tmp_path / "c") and not (tmp_path / "c").exists()


@pytest.mark.slow
def test_with_accounting_sacct_shows_a_finished_job(tmp_path: Path) -> None:
    need_packages(accounting=True)
    with slurm.serve(tmp_path / "c", 1, accounting=True) as cluster:
        job = submit(cluster, wrap="true")
        wait_until(lambda: cluster.run("sacct", "-XnPj", job, "-o", "State").strip() == "COMPLETED")
    assert not processes_of(tmp_path / "c")
