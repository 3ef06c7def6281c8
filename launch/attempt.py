"""`python -m launch.attempt`: what job.sh asks before an attempt and after it, in a step of its own. It
answers in one line: VERDICT (go or stop) ATTEMPT NODES-TO-LEAVE-OUT SECONDS-TO-WAIT, with - for nothing; the
latter two are for the next attempt.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import urllib.request

from configs.errors import ConfigError, run_command
from configs.lease import Lease, claim, holder
from configs.rundir import RunDir
from configs.schema import Slurm
from data.in_hand import deaths
from slurm.chain import Cause, Failure, Verdict, decide, record_end, settle, stop_requested


def begin(
    run: RunDir, settings: Slurm, chain: str, job: str, partition_nodes: int, before: str, nodes: list[str]
) -> tuple[Verdict, int]:
    """Take the run for this job, if the chain may go on. before: the job before it. Returns the number of the
    attempt, too."""
    settle(run, chain)
    verdict = _judge(run, settings, chain, partition_nodes)
    if not verdict.go:
        return verdict, -1
    now = holder(run)
    of_chain = now is not None and now.job in {
        before,
        *(line.get("job") for line in run.ledger("attempt") if line.get("chain") == chain),
    }
    try:
        lease = claim(run, job=job, supersede=of_chain)
    except ConfigError as error:  # another chain, or `launch train`
        return Verdict(False, str(error)), -1
    run.record(
        "attempt",
        attempt=lease.attempt,
        chain=chain,
        job=job,
        host=nodes[0],
        nodes=nodes,
        ranks=settings.tasks * len(nodes),
    )
    return verdict, lease.attempt


def end(
    run: RunDir, settings: Slurm, chain: str, job: str, partition_nodes: int, code: int
) -> tuple[Verdict, int]:
    """Note how this job's attempt ended, and judge whether another one may follow."""
    attempt = next(line["attempt"] for line in reversed(run.ledger("attempt")) if line.get("job") == job)
    in_hand = [f"rank {death.rank}: {death}" for death in deaths(run, attempt)]
    found = record_end(
        run,
        attempt,
        code,
        Failure(Cause.POISONED_SAMPLE, in_hand[0], "", by_signal=True) if in_hand else None,
    )
    print(f"attempt {attempt} ended: {found.words}", *in_hand[1:], sep="\n", file=sys.stderr, flush=True)
    Lease(run, attempt).release()
    verdict = _judge(run, settings, chain, partition_nodes)
    if verdict.go and settings.resubmit == "none":
        verdict = Verdict(False, f"{found.words} (slurm.resubmit=none)")
    if not verdict.go:
        run.next_config.unlink(missing_ok=True)  # if it was refused: who goes on must not read it
    return verdict, attempt


def _judge(run: RunDir, settings: Slurm, chain: str, partition_nodes: int) -> Verdict:
    if stop_requested(run):
        return Verdict(False, "stopped by `launch stop`; `launch submit` goes on")
    attempts = {line["attempt"] for line in run.ledger("attempt") if line.get("chain") == chain}
    ends = [line for line in run.ledger("ended") if line["attempt"] in attempts]
    return decide(settings, ends, partition_nodes)


def _tell_end(run: RunDir, chain: str, why: str, notify: str | None) -> None:
    """The chain ends: into the ledger, and to the webhook that is asked for."""
    run.record("chain_ended", chain=chain, why=why)
    print(f"the chain ends: {why}", file=sys.stderr, flush=True)
    if notify and "://" in notify:
        body = json.dumps(
            {"run": str(run.path), "chain": chain, "why": why, "text": f"{run.path.name}: {why}"}
        ).encode()
        request = urllib.request.Request(notify, body, {"Content-Type": "application/json"})
        try:
            urllib.request.urlopen(request, timeout=10).close()
        except (OSError, ValueError) as error:
            print(f"slurm.notify: {notify}: {error}", file=sys.stderr, flush=True)


def main() -> None:
    """begin RUN CHAIN JOB PARTITION-NODES JOB-BEFORE NODES..., or end RUN CHAIN JOB PARTITION-NODES CODE."""
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)  # meant for the ranks; job.sh heeds them
    what, path, chain, job, partition_nodes, *rest = sys.argv[1:]
    run = RunDir(path)
    settings = run.read_next_config().slurm
    place = run, settings, chain, job, int(partition_nodes)
    verdict, attempt = begin(*place, rest[0], rest[1:]) if what == "begin" else end(*place, int(rest[0]))
    if not verdict.go:
        _tell_end(run, chain, verdict.why, settings.notify)
    if verdict.exclude:
        print(
            f"leaves out {', '.join(verdict.exclude)}: at fault within the last {settings.exclude_minutes}"
            " minutes",
            file=sys.stderr,
            flush=True,
        )
    print(
        "go" if verdict.go else "stop",
        attempt,
        ",".join(verdict.exclude) or "-",
        round(verdict.delay),
        flush=True,
    )
    os._exit(0)


if __name__ == "__main__":
    run_command(main)
