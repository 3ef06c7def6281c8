"""When a chain ends, and what else changes between its attempts."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from configs.load import load
from configs.run.events import AttemptBegan, ChainEnded, CouldNotBegin, Ended
from data.index import load_sidecar
from data.merged import is_held_out
from data.sources import expand
from tests.cluster.chains import make_chain
from tests.cluster.conftest import need_packages
from tests.cluster.test_chain import ENDLESS, check_the_same, finish_and_compare, kill_rank, preempt, stop
from tests.making import audit_of_attempts
from tools.sandbox import slurm
from tools.sandbox.slurm import Cluster

pytestmark = pytest.mark.slow


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The URL of one, and what it has been told."""
    told: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", told
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_crash_loop_stops_after_the_limit_and_says_why(
    cluster: Cluster, tmp_path: Path, model: Path, shards: str, webhook
) -> None:
    url, told = webhook
    chain = make_chain(
        cluster, tmp_path, model, shards, ENDLESS, slurm={"max_attempts_without_progress": 3, "notify": url}
    )
    (chain.faults / "every-rank-1").write_text("ZeroDivisionError", encoding="utf-8")
    chain.submit()
    why = chain.finished()
    assert (
        "3 attempts failed in a row without a checkpoint after step 0" in why
        and "ZeroDivisionError" in why
        and "max_attempts_without_progress" in why
    )
    assert [cause for cause, _ in chain.ends()] == ["error"] * 3
    begun = [line.time for line in chain.run.ledger.read().of(AttemptBegan)]
    assert begun[2] - chain.run.ledger.read().of(Ended)[1].time > 10, (
        "the second failure in a row is followed by a pause"
    )
    status = chain.launch("status", chain.run.path)
    assert "3 attempts failed in a row" in " ".join(status.stdout.split()), status.stdout
    assert [line["why"] for line in told] == [why], "told once, at the end of the chain"


def test_an_unfit_node_is_named_and_left_out(
    cluster: Cluster, tmp_path: Path, model: Path, shards: str
) -> None:
    chain = make_chain(cluster, tmp_path, model, shards, 4, slurm={"sbatch": ["--nodelist=n1,n2"]})
    (chain.faults / "skew-n2").touch()
    script = chain.launch("submit", chain.config, "--dry-run")
    assert script.returncode == 0, script.stderr
    cluster.run("sbatch", str(chain.run.slurm / "job.sh"))
    following = (
        chain.wait("the next job", lambda: list((chain.run.slurm / "jobs").glob("*.next")))[0]
        .read_text(encoding="utf-8")
        .strip()
    )
    cluster.run("scontrol", "update", f"JobId={following}", "ReqNodeList=")
    assert chain.finished() == "finished", chain.said()
    assert (
        chain.ends()[0] == ("unfit_node", chain.ends()[0][1])
        and "n2 is unfit: clock: +100 s off" in chain.ends()[0][1]
    ), chain.said()
    assert "n2" not in chain.nodes() and chain.run.ledger.read().of(AttemptBegan)[0].nodes == ["n1", "n2"]


def test_a_node_on_which_no_job_can_begin_is_left_out(
    cluster: Cluster, tmp_path: Path, model: Path, shards: str
) -> None:
    """The first job falls on n1, where there is no Python."""
    setup = ['if [ "$SLURMD_NODENAME" = n1 ]; then python=/nowhere/python; fi']
    chain = make_chain(cluster, tmp_path, model, shards, 4, slurm={"nodes": 1, "setup": setup})
    first = chain.submit()
    assert chain.finished(60) == "finished", chain.said()
    history = chain.run.ledger.read()
    assert [(event.job, event.node) for event in history.of(CouldNotBegin)] == [(first, "n1")]
    assert len(history.of(AttemptBegan)) == 1 and chain.nodes() != ["n1"]


def test_a_drill_reports_seconds_to_save_to_restart_and_to_the_first_step(
    cluster: Cluster, tmp_path: Path, model: Path, shards: str, launch
) -> None:
    chain = make_chain(cluster, tmp_path, model, shards, ENDLESS)
    early = chain.launch("drill", tmp_path / "faults")
    assert early.returncode == 2 and "not the folder of a run" in early.stderr
    chain.submit()
    chain.training()
    done = chain.launch("drill", chain.run.path)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"([\d.]+) s  (.*)", done.stdout)
    assert [what for _, what in found] == [
        "durable save",
        "next attempt starts",
        "it has loaded the checkpoint",
        "its first step is taken",
    ], done.stdout
    seconds = [float(number) for number, _ in found]
    assert seconds == sorted(seconds) and seconds[0] < 5
    check_the_same(chain, launch)


def test_selftest_takes_a_config_once_through_everything(
    cluster: Cluster, tmp_path: Path, model: Path, shards: str
) -> None:
    chain = make_chain(cluster, tmp_path, model, shards, ENDLESS)
    done = chain.launch("selftest", chain.config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: this cluster is ready for it" in done.stdout
    assert re.search(r"resumed: at step \d+ on 2 processes instead of 4", done.stdout), done.stdout
    assert (tmp_path / "run-selftest/export/model.safetensors").exists() and not chain.run.path.exists()


def test_cancelled_by_the_user_it_stays_so_and_submitting_again_goes_on(
    cluster: Cluster, tmp_path: Path, model: Path, shards: str, launch
) -> None:
    chain = make_chain(cluster, tmp_path, model, shards, ENDLESS)
    chain.submit()
    chain.training()
    cluster.run("scancel", chain.job())
    chain.wait("the end of all jobs", lambda: not chain.jobs())
    status = chain.launch("status", chain.run.path)
    assert "cancelled: saved at step" in " ".join(status.stdout.split()), status.stdout
    again = chain.launch("submit", chain.config)
    assert again.returncode == 0, again.stderr
    chain.training(0)
    refused = chain.launch("submit", chain.config)
    assert (
        refused.returncode == 2
        and "its chain is still there" in refused.stderr
        and "launch stop" in refused.stderr
    )
    check_the_same(chain, launch)


def test_on_four_nodes_on_two_and_on_three(
    cluster: Cluster, tmp_path: Path, model: Path, shards: str, launch
) -> None:
    chain = make_chain(cluster, tmp_path, model, shards, ENDLESS, slurm={"nodes": "2-4"})
    chain.submit()
    attempt, sizes = chain.training(), [len(chain.nodes())]
    for nodes in (2, 3):
        following = (chain.run.slurm / "jobs" / f"{chain.job()}.next").read_text(encoding="utf-8").strip()
        cluster.run(
            "scontrol", "update", f"JobId={following}", f"NumNodes={nodes}-{nodes}", f"NumTasks={2 * nodes}"
        )
        kill_rank(chain)
        attempt = chain.training(attempt)
        sizes.append(len(chain.nodes()))
    assert sizes == [4, 2, 3]
    check_the_same(chain, launch)


def test_a_poisoned_sample_does_not_loop(cluster: Cluster, tmp_path: Path, model: Path, shards: str) -> None:
    """It ends two attempts, and is left out in the third."""
    chain = make_chain(cluster, tmp_path, model, shards, 30)
    config = load(chain.config)
    shard, *_ = expand(config.data.sources[0])
    sidecar = load_sidecar(shard, config.data.index_dir)
    assert sidecar is not None
    row = next(row for row in sidecar.table.to_pylist() if not is_held_out(row["key"], shard.source))
    audio = Path(shard.location.url.removeprefix("file://")).read_bytes()[
        row["audio_offset"] : row["audio_offset"] + row["audio_size"]
    ]
    (chain.faults / "poison").write_text(str(zlib.crc32(audio)), encoding="utf-8")
    chain.submit()
    assert chain.finished() == "finished", chain.said()
    assert [cause for cause, _ in chain.ends()] == [
        "poisoned_sample",
        "poisoned_sample",
        "finished",
    ], chain.said()
    assert all(row["key"] in words for _, words in chain.ends()[:2])
    rejected = {key for taken in audit_of_attempts(chain.run.path).values() for key in taken.rejected}
    assert [key.rsplit("/", 1)[1] for key in rejected] == [row["key"]]
    assert {sample.reason for sample in chain.run.quarantine.read().samples} == {
        "its decoder crashed or never ended in 2 attempts"
    }


def test_two_runs_chain_side_by_side(
    cluster: Cluster, tmp_path: Path, model: Path, shards: str, launch
) -> None:
    chains = [
        make_chain(cluster, tmp_path / name, model, shards, ENDLESS, slurm={"nodes": 1})
        for name in ("one", "two")
    ]
    for chain in chains:
        chain.submit()
    for chain in chains:
        chain.training()
        os.kill(chain.pid(1), signal.SIGKILL)
    for chain in chains:
        chain.training(0)
    for chain in chains:
        stop(chain)
    for chain in chains:
        finish_and_compare(chain, launch)
    folders = [{began.job for began in chain.run.ledger.read().of(AttemptBegan)} for chain in chains]
    assert len(folders[0]) == len(folders[1]) == 3 and not folders[0] & folders[1]


def test_without_resubmission_one_attempt_is_all(
    cluster: Cluster, tmp_path: Path, model: Path, shards: str
) -> None:
    chain = make_chain(cluster, tmp_path, model, shards, ENDLESS, slurm={"resubmit": "none"})
    chain.submit()
    chain.training()
    kill_rank(chain)
    chain.wait("the end of all jobs", lambda: not chain.jobs())
    assert chain.ends() == [("crash", chain.ends()[0][1])]
    assert chain.run.ledger.read().of(ChainEnded)[-1].why.startswith("crash")


WANTS_MEMORY = """
function slurm_job_submit(job, partitions, user)
  if job.pn_min_memory and job.pn_min_memory ~= slurm.NO_VAL64 then return slurm.SUCCESS end
  slurm.log_user("Say how much memory you need, see\\n  https://site/memory")
  return slurm.ERROR
end
function slurm_job_modify() return slurm.SUCCESS end
return slurm.SUCCESS
"""


@pytest.fixture
def accounted(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster with accounting, that warns with USR2, leaves a grace, starts what was requeued soon, wants
    jobs to say how much memory they need, and has a QOS that takes one job of each user."""
    need_packages(accounting=True)
    folder = tmp_path / "slurm"
    extra = [
        f"AuthInfo=socket={folder}/munge.sock,cred_expire=8",
        "SlurmctldParameters=preempt_send_user_signal",
        "AccountingStorageEnforce=limits,qos",
    ]
    with slurm.serve(folder, accounting=True, grace_seconds=15, extra=extra) as running:
        running.run("sacctmgr", "--immediate", "add", "qos", "one", "MaxSubmitJobsPerUser=1")
        running.run("sacctmgr", "--immediate", "modify", "user", "root", "set", "qos+=one")
        (folder / "job_submit.lua").write_text(WANTS_MEMORY, encoding="utf-8")
        with (folder / "slurm.conf").open("a", encoding="utf-8") as settings:
            settings.write("JobSubmitPlugins=lua\n")
        running.run("scontrol", "reconfigure")
        yield running


def test_a_site_that_wants_memory_takes_one_job_at_a_time_and_leaves_a_grace(
    accounted: Cluster, tmp_path: Path, model: Path, shards: str, launch
) -> None:
    """A job whose successor is not taken requeues itself."""
    chain = make_chain(accounted, tmp_path / "run", model, shards, ENDLESS, slurm={"qos": "one"})
    refused = chain.launch("submit", chain.config)
    assert refused.returncode == 2 and "see\nsbatch: error:   https://site/memory\n" in refused.stderr
    doctor = chain.launch("doctor", chain.config)
    assert doctor.returncode == 1 and "https://site/memory" in doctor.stdout
    chain.config.write_text(
        chain.config.read_text(encoding="utf-8").replace("  qos: one", "  qos: one\n  memory_gb: 1"),
        encoding="utf-8",
    )
    chain.submit()
    attempt = chain.training()
    status = " ".join(chain.launch("status", chain.run.path).stdout.split())
    assert "QOSMaxSubmitJobPerUserLimit" in status and "slurm.resubmit: requeue" in status, status
    for happen in (kill_rank, preempt):
        happen(chain)
        attempt = chain.training(attempt)
    assert [cause for cause, _ in chain.ends()] == ["crash", "preempted"], chain.said()
    assert len({line.job for line in chain.run.ledger.read().of(AttemptBegan)}) == 1
    check_the_same(chain, launch)
    assert "COMPLETED" in accounted.run(
        "sacct", "--noheader", "--allocations", f"--jobs={chain.job()}", "--format=State"
    )
