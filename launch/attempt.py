"""`python -m launch.attempt`: what job.sh asks before an attempt and after it, in a step of its own.

It answers in one line: VERDICT (go or stop) ATTEMPT NODES-TO-LEAVE-OUT SECONDS-TO-WAIT, with - for nothing;
the latter two are for the next attempt.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import urllib.request
from dataclasses import dataclass

from configs.errors import ConfigError, run_command
from configs.run.causes import Cause
from configs.run.crash_journal import deaths
from configs.run.ends import Failure
from configs.run.events import AttemptBegan, ChainEnded, CouldNotBegin, Ended
from configs.run.folder import RunDir
from configs.run.lease import Lease, claim, holder
from configs.schema import Slurm
from configs.streams import open_streams
from launch import snapshot
from slurm.chain import Verdict, decide, record_end, settle, stop_requested


@dataclass(frozen=True)
class Judge:
    """Judges the attempts of one job. chain: the first job of its chain; partition_nodes: how many nodes the
    partition has."""

    run: RunDir
    settings: Slurm
    chain: str
    job: str
    partition_nodes: int

    def begin(self, before: str, nodes: list[str]) -> tuple[Verdict, int]:
        """Take the run for this job, if the chain may go on. before: the job before it. Returns the number of
        the attempt, too; -1 if there is none."""
        settle(self.run, self.chain)
        self._record_failed_starts()
        try:
            snapshot.check(self.run.code)
        except ConfigError as error:
            return Verdict(False, str(error)), -1
        verdict = self._judge()
        if not verdict.go:
            return verdict, -1
        now = holder(self.run)
        jobs = [began.job for began in self._attempts()]
        try:
            lease = claim(self.run, job=self.job, supersede=now is not None and now.job in [before, *jobs])
        except ConfigError as error:  # another chain, or `launch train`
            return Verdict(False, str(error)), -1
        self.run.ledger.record(
            AttemptBegan(
                attempt=lease.attempt,
                ranks=self.settings.tasks * len(nodes),
                nodes=nodes,
                job=self.job,
                chain=self.chain,
            )
        )
        return verdict, lease.attempt

    def end(self, exit_code: int) -> tuple[Verdict, int]:
        """Note how this job's attempt ended, and judge whether another one may follow."""
        attempt = next(began.attempt for began in reversed(self._attempts()) if began.job == self.job)
        in_hand = [f"rank {death.rank}: {death}" for death in deaths(self.run, attempt)]
        failure = Failure(Cause.POISONED_SAMPLE, in_hand[0], by_signal=True) if in_hand else None
        ended = record_end(self.run, attempt, exit_code, failure)
        print(f"attempt {attempt} ended: {ended.words}", *in_hand[1:], sep="\n", file=sys.stderr, flush=True)
        Lease(self.run, attempt).release()
        verdict = self._judge()
        if verdict.go and self.settings.resubmit == "none":
            verdict = Verdict(False, f"{ended.words} (slurm.resubmit=none)")
        if not verdict.go:
            self.run.proposal.withdraw()
        return verdict, attempt

    def tell_end(self, why: str) -> None:
        """The chain ends: into the ledger, and to the webhook that is asked for."""
        attempt = self.run.ledger.read().next_attempt - 1
        self.run.ledger.record(ChainEnded(attempt=attempt, chain=self.chain, why=why))
        print(f"the chain ends: {why}", file=sys.stderr, flush=True)
        notify = self.settings.notify
        if not notify or "://" not in notify:
            return
        text = f"{self.run.path.name}: {why}"
        body = {"run": str(self.run.path), "chain": self.chain, "why": why, "text": text}
        request = urllib.request.Request(
            notify, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            urllib.request.urlopen(request, timeout=10).close()
        except (OSError, ValueError) as error:
            print(f"slurm.notify: {notify}: {error}", file=sys.stderr, flush=True)

    def _attempts(self) -> list[AttemptBegan]:
        began = self.run.ledger.read().of(AttemptBegan)
        return [attempt for attempt in began if attempt.chain == self.chain]

    def _judge(self) -> Verdict:
        if stop_requested(self.run):
            return Verdict(False, "stopped by `launch stop`; `launch submit` goes on")
        history = self.run.ledger.read()
        attempts = {began.attempt for began in self._attempts()}
        ends = [end for end in history.of(Ended) if end.attempt in attempts]
        could_not_begin = history.of(CouldNotBegin)
        return decide(self.settings, ends, self.partition_nodes, could_not_begin=could_not_begin)

    def _record_failed_starts(self) -> None:
        """Take into the ledger what job.sh has noted of jobs that could not even ask: lines of JOB NODE."""
        noted = self.run.slurm / "jobs" / "failed"
        if not noted.is_file():
            return
        attempt = self.run.ledger.read().next_attempt
        for line in noted.read_text(encoding="utf-8").splitlines():
            job, _, node = line.partition(" ")
            if node and job != self.job:
                self.run.ledger.record(CouldNotBegin(attempt=attempt, job=job, node=node))
        noted.unlink()


def main() -> None:
    """begin RUN CHAIN JOB PARTITION-NODES JOB-BEFORE NODES..., or end RUN CHAIN JOB PARTITION-NODES CODE."""
    open_streams(unheeded=True)  # a job's log may be full
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)  # meant for the ranks; job.sh heeds them
    what, path, chain, job, partition_nodes, *rest = sys.argv[1:]
    run = RunDir(path)
    settings = run.proposal.read().slurm
    judge = Judge(run, settings, chain, job, int(partition_nodes))
    if what == "begin":
        verdict, attempt = judge.begin(before=rest[0], nodes=rest[1:])
    else:
        verdict, attempt = judge.end(exit_code=int(rest[0]))
    if not verdict.go:
        judge.tell_end(verdict.why)
    exclude = ",".join(verdict.exclude)
    if exclude:
        minutes = settings.exclude_minutes
        print(
            f"leaves out {exclude}: at fault within the last {minutes} minutes", file=sys.stderr, flush=True
        )
    print("go" if verdict.go else "stop", attempt, exclude or "-", round(verdict.delay), flush=True)
    os._exit(0)


if __name__ == "__main__":
    run_command(main)
