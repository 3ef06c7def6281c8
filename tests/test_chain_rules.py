"""Whether a chain goes on, which nodes it leaves out, and who is named for a hang: rules that docs/slurm.md
promises, without a cluster."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from configs.errors import UnfitNode
from configs.load import validate
from configs.ports import free_ports
from configs.run.causes import Cause
from configs.run.events import AttemptBegan, CouldNotBegin, Ended
from configs.run.folder import RunDir
from configs.schema import Slurm
from slurm.chain import MISFORTUNES_WITHOUT_PROGRESS, decide, record_end
from slurm.said import first_failure
from slurm.submit import script_text
from slurm.watchdog import Sign, explain
from tests.making import config_values
from trainer import distributed

NOW = 1e6
SETTINGS = Slurm(nodes=2, exclude_minutes=60, max_attempts_without_progress=3)
NODES = ["n1", "n1", "n2", "n2"]


def ended(cause: str, node: str = "", saved: int = 0, minutes_ago: float = 1) -> Ended:
    return Ended(
        time=NOW - 60 * minutes_ago,
        attempt=0,
        cause=Cause(cause),
        words=f"{cause}: what it said",
        at=0.0,
        node=node,
        saved=saved,
    )


def could_not_begin(node: str, minutes_ago: float = 1) -> CouldNotBegin:
    return CouldNotBegin(time=NOW - 60 * minutes_ago, attempt=0, job="7", node=node)


@pytest.mark.parametrize("cause", ["finished", "stopped", "cancelled", "bad_input", "superseded"])
def test_what_is_final_ends_the_chain_with_its_words(cause: str) -> None:
    assert decide(SETTINGS, [ended("preempted"), ended(cause)], 4, NOW).why == f"{cause}: what it said"


@pytest.mark.parametrize(
    "cause",
    ["preempted", "saved", "node_lost", "crash", "hang", "error", "time_limit", "unknown", "poisoned_sample"],
)
def test_after_one_of_anything_else_it_goes_on_at_once(cause: str) -> None:
    verdict = decide(SETTINGS, [ended(cause)], 4, NOW)
    assert verdict.go and not verdict.delay


def test_failures_without_progress_are_counted_waited_for_and_enough_at_last() -> None:
    many = Slurm(nodes=2, max_attempts_without_progress=6)
    assert [decide(many, [ended("crash")] * count, 4, NOW).delay for count in range(1, 6)] == [
        0,
        60,
        300,
        600,
        600,
    ]
    verdict = decide(SETTINGS, [ended("crash"), ended("hang"), ended("error")], 4, NOW)
    assert not verdict.go and verdict.why.startswith(
        "3 attempts failed in a row without a checkpoint after step 0; the last one: error: what it said"
    )


def test_a_checkpoint_resets_the_count_and_preemptions_do_not_count() -> None:
    assert decide(SETTINGS, [ended("crash"), ended("crash"), ended("crash", saved=8)], 4, NOW).go
    assert decide(SETTINGS, [ended("preempted")] * 50, 4, NOW).go
    assert not decide(
        SETTINGS,
        [ended("crash"), ended("preempted"), ended("crash"), ended("preempted"), ended("crash")],
        4,
        NOW,
    ).go


def test_misfortunes_are_borne_longer() -> None:
    assert decide(SETTINGS, [ended("node_lost")] * (MISFORTUNES_WITHOUT_PROGRESS - 1), 4, NOW).go
    assert not decide(SETTINGS, [ended("node_lost")] * MISFORTUNES_WITHOUT_PROGRESS, 4, NOW).go


@pytest.mark.parametrize(
    ("ends", "left_out"),
    [
        ([ended("crash", "n3")], ()),
        ([ended("crash", "n3", saved=2), ended("hang", "n3", saved=4)], ("n3",)),
        ([ended("unfit_node", "n3")], ("n3",)),
        ([ended("error", "n3", saved=2), ended("error", "n3", saved=4)], ()),  # an exception is the code's
        ([ended("unfit_node", "n3", minutes_ago=61)], ()),
        (
            [ended("unfit_node", node, saved=step) for step, node in enumerate(["n1", "n2", "n3", "n4"])],
            ("n3", "n4"),
        ),  # two must remain: the newest
    ],
)
def test_guilty_nodes_are_left_out_for_a_time_as_long_as_enough_remain(
    ends: list[Ended], left_out: tuple[str, ...]
) -> None:
    assert decide(SETTINGS, ends, 4, NOW).exclude == left_out


def test_a_node_that_cannot_even_ask_is_left_out_for_a_time() -> None:
    for minutes_ago, left_out in ((1, ("n3",)), (61, ())):
        events = [could_not_begin("n3", minutes_ago)]
        verdict = decide(SETTINGS, [ended("preempted")], 4, NOW, could_not_begin=events)
        assert verdict.go and verdict.exclude == left_out


FAKES = {
    "sbatch": "echo 99",
    "scontrol": """case "$1 $2" in
  "--oneliner show") echo "JobId=$4 JobState=RUNNING ExcNodeList=bad Requeue=1" ;;
  update*) echo "$@" >>told ;;
esac""",
    "sinfo": "cat nodes",
    "scancel": 'echo "scancel $1" >>told',
    "srun": "echo no such python >&2; exit 2",
    "squeue": "true",
}
"""Slurm's commands on nodes where no job can begin. What they are told is in the file `told`."""


@pytest.fixture(params=["", "PATH=/nowhere; exit 0"], ids=["no Python", "setup exits"])
def begin_job(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], list[str]]:
    """Runs a job's script on a node; returns what Slurm is told of the next job."""
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
    values = config_values(
        "run", tmp_path, tmp_path, "a.tar", slurm={"nodes": "1-4", "setup": [request.param]}
    )
    config = validate(values, "test")

    def begin(job: str, node: str) -> list[str]:
        told = tmp_path / "told"
        told.write_text("", encoding="utf-8")
        done = subprocess.run(
            ["bash", "-c", script_text(config, RunDir(config.run.dir), tmp_path)],
            env={**os.environ, "SLURM_JOB_ID": job, "SLURMD_NODENAME": node, "SLURM_JOB_NODELIST": node},
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            check=False,
        )
        said = (tmp_path / f"run/slurm/{job}.log").read_text(encoding="utf-8")
        assert done.returncode == 1 and f"could not begin on {node}" in said
        lines = [*told.read_text(encoding="utf-8").splitlines(), *said.splitlines()]
        return [line for line in lines if "ExcNodeList" in line or "scancel" in line or "in a row" in line]

    return begin


@pytest.mark.parametrize(
    ("nodes", "jobs_on", "left_out"),
    [
        (4, ["n1", "n2", "n3"], ["bad,n1 StartTime=now+0", "bad,n2,n1 StartTime=now+120"]),
        (2, ["n1", "n2", "n1"], ["bad,n1 StartTime=now+0", "bad,n2 StartTime=now+120"]),
        (1, ["n1", "n1", "n1"], ["bad StartTime=now+0", "bad StartTime=now+120"]),
    ],
)
def test_a_job_that_cannot_begin_leaves_its_node_out_and_three_end_the_chain(
    begin_job: Callable[[str, str], list[str]],
    tmp_path: Path,
    nodes: int,
    jobs_on: list[str],
    left_out: list[str],
) -> None:
    """As long as other nodes remain, each job is kept off those where one could not begin."""
    names = [f"n{number}" for number in range(1, nodes + 1)]
    (tmp_path / "nodes").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    for number, wanted in enumerate(left_out):
        told = begin_job(f"7{number}", jobs_on[number])
        assert told[-1].endswith(f"ExcNodeList={wanted}") and "scancel 99" not in told
    *_, cancelled, words = begin_job("72", jobs_on[2])
    assert cancelled == "scancel 99" and "3 jobs in a row could not begin" in words


def test_being_asked_to_save_again_and_again_without_progress_is_a_failure() -> None:
    """As by a site that sends TERM to every job at once: it would go on for ever."""
    delays = [decide(SETTINGS, [ended("saved")] * count, 4, NOW).delay for count in (1, 2)]
    assert delays == [0, 60]
    verdict = decide(SETTINGS, [ended("saved")] * 3, 4, NOW)
    assert not verdict.go and "3 attempts failed in a row without a checkpoint after step 0" in verdict.why
    assert decide(SETTINGS, [ended("saved", saved=step) for step in range(9)], 4, NOW).go


def test_no_node_is_left_out_where_none_can_be_spared() -> None:
    assert decide(SETTINGS, [ended("unfit_node", "n2")], 2, NOW).exclude == ()
    assert decide(Slurm(nodes="1-8"), [ended("unfit_node", "n2")], 2, NOW).exclude == ("n2",)


def srun_says(folder: Path, *lines: str) -> RunDir:
    """A run whose attempt 1, of job 12, has ended with these words of srun; it was requeued before."""
    run = RunDir(folder / "run")
    run.slurm.mkdir(parents=True)
    log = ["attempt 0 begins", "srun: error: Node failure on n9", "attempt 1 begins", *lines, ""]
    (run.slurm / "12.log").write_text("\n".join(log), encoding="utf-8")
    run.ledger.record(AttemptBegan(attempt=1, ranks=4, nodes=["n1", "n2"], job="12", chain="12"))
    return run


LAUNCH_OF_12 = "srun: error: Task launch for StepId=12.0 failed on node n3: "


@pytest.mark.parametrize(
    ("line", "cause", "node", "words"),
    [
        (LAUNCH_OF_12 + "Communication connection failure", "unfit_node", "n3", "Communication connection"),
        (LAUNCH_OF_12 + "Job credential expired", "unfit_node", "n3", "launched on n3: Job credential exp"),
        (LAUNCH_OF_12 + "Socket timed out on send/recv operation", "unfit_node", "n3", "Socket timed out"),
        (
            "srun: error: Task launch for 12.0 failed on node gpu-a3.site: Unable to contact slurmd",
            "unfit_node",
            "gpu-a3.site",
            "Unable to contact slurmd",
        ),
        (
            "srun: error: task launch for step 12.0 failed ON node n3: No route",
            "unfit_node",
            "n3",
            "No route",
        ),
        ("srun: error: Node failure on n2", "node_lost", "n2", "node lost: n2"),
        ("srun: error: n1: tasks 0-1: Killed", "crash", "n1", "crash: rank 0-1 on n1: Killed"),
        ("srun: error: n[1-2]: tasks 0-3: Killed", "crash", "", "rank 0-3 on n[1-2]: Killed"),
        ("srun: error: n2: task 3: Out Of Memory", "out_of_memory", "n2", "rank 3 on n2: Out Of Memory"),
        ("srun: error: n2: task 2: Segmentation fault (core dumped)", "crash", "n2", "Segmentation fault"),
        ("srun: error: n2: task 2: Exited with exit code 1", "crash", "n2", "Exited with exit code 1"),
        ("srun: error: n[1-2]: tasks 0-3: Exited with exit code 85", "unknown", "", "job 12"),
        ("srun: Job step aborted: Waiting up to 7 seconds for job step to finish.", "unknown", "", "job 12"),
    ],
)
def test_what_srun_says_names_the_cause_and_the_node(
    tmp_path: Path, line: str, cause: str, node: str, words: str
) -> None:
    """Others that end because of it may be told of first."""
    others = "srun: error: n1: tasks 0-1: Exited with exit code 85"
    ended = record_end(srun_says(tmp_path, others, line), 1)
    assert (ended.cause.value, ended.node) == (cause, node) and words in ended.words


def test_who_was_struck_by_a_signal_was_first(tmp_path: Path) -> None:
    lines = ["n1: tasks 0-1: Exited with exit code 1", "n2: task 3: Terminated", "n2: task 2: Bus error"]
    run = srun_says(tmp_path, *[f"srun: error: {line}" for line in lines])
    failure = first_failure(run, "12", 1)
    assert failure is not None and failure.by_signal and (failure.node, failure.rank) == ("n2", 2)


def test_a_node_that_no_task_can_be_launched_on_is_left_out(tmp_path: Path) -> None:
    run = srun_says(
        tmp_path,
        LAUNCH_OF_12 + "Communication connection failure",
        "srun: error: Application launch failed: Communication connection failure",
        "srun: Job step aborted: Waiting up to 7 seconds for job step to finish.",
        "srun: error: n1: tasks 0-1: Killed",
    )
    verdict = decide(SETTINGS, [record_end(run, 1)], 4)
    assert verdict.go and verdict.exclude == ("n3",)


def sign(
    rank: int, *, arrived: bool = True, step: int = 7, phase: str = "training", in_hand: str = ""
) -> Sign:
    return Sign(rank, NODES[rank], phase, step, arrived, 60.0, in_hand)


@pytest.mark.parametrize(
    ("signs", "node", "suspects", "words"),
    [
        ([sign(0), sign(1), sign(2)], "n2", [3], "rank 3 gave no sign of life"),
        ([sign(0), sign(1)], "n2", [2, 3], "ranks 2, 3 gave no sign of life"),
        (
            [sign(0), sign(1, arrived=False, in_hand="x.flac of a.tar"), sign(2), sign(3)],
            "n1",
            [1],
            "(in hand: x.flac of a.tar)",
        ),
        (
            [sign(0, step=8), sign(1, step=8), sign(2, arrived=False), sign(3, step=8, arrived=False)],
            "n2",
            [2],
            "rank 2 on n2: training, step 7",
        ),
        ([sign(rank) for rank in range(4)], "", [], "all ranks are stuck"),
        (
            [sign(0), sign(1, arrived=False), sign(2), sign(3, arrived=False)],
            "",
            [1, 3],
            "while the others wait",
        ),
    ],
)
def test_a_hang_is_the_fault_of_who_is_silent_then_of_who_has_not_arrived(
    signs: list[Sign], node: str, suspects: list[int], words: str
) -> None:
    hang = explain(signs, NODES)
    assert (hang.node, hang.suspects) == (node, suspects) and words in hang.words


def test_a_node_whose_ranks_do_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_ports(1)[0]))
    patience, others = timedelta(seconds=2), []

    def come(rank: int) -> None:
        try:
            distributed.meet(rank, NODES, patience)
        except Exception as error:
            others.append(error)

    thread = threading.Thread(target=come, args=(1,))
    thread.start()
    with pytest.raises(UnfitNode, match="2 of 4 ranks did not come within 2 s: those of n2") as caught:
        distributed.meet(0, NODES, patience)
    thread.join()
    assert caught.value.node == "n2" and len(others) == 1
