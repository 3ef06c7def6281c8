"""The training loop, from fetching a step to saving it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn, Protocol, TypeVar

import torch

from configs.errors import EarwitnessError, PeerFailed
from configs.run.events import Skipped, Spike
from configs.run.goodput import Phase
from data.batch import Batch, collate
from data.loader import Loader, Step
from data.retry import received
from trainer.courier import CLOSE_SECONDS
from trainer.engines import Update
from trainer.evaluate import LeftOff
from trainer.evaluation import Evaluation
from trainer.feed import Fed, Feed
from trainer.flops import step_flops
from trainer.garbage import collected_between_steps
from trainer.loss import token_losses, token_weights
from trainer.monitor import Monitor, SpikeWindow
from trainer.optim import learning_rate
from trainer.profiling import StepProfiler
from trainer.session import Session, StopFlag, Watch
from trainer.tally import Tally
from trainer.transfer import OnItsWay

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
LAST_CHANCE = 5.0
"""Seconds that a checkpoint under way gets when this rank has failed, and trackers after it: less than those
after which the launcher ends it."""
SLICE = 1.0
"""Seconds after which a rank that waits for samples looks whether a stop is requested."""


class Coming(Protocol[T_co]):
    """Gives one thing after the other, and says whether the next one is there."""

    def ready(self, seconds: float) -> bool:
        """Wait until there is something to give at once, an error included. False if that takes longer."""

    def __next__(self) -> T_co:
        """The next one."""


class Outcome(Enum):
    """How an attempt ended, if not by an error. SAVED: it was asked to stop; what it had is on disk."""

    FINISHED = "finished"
    SAVED = "saved"


@dataclass(frozen=True)
class StepSums:
    """What the ranks tell each other before a step, as sums over all of them."""

    failed: float
    """Ranks that could not get their samples."""
    superseded: float
    """Ranks that know of a later attempt."""
    unsaved: float
    """Ranks that know that the checkpoint under way has failed."""
    stopping: float
    """Ranks that were asked to stop."""
    overdue: float
    """Ranks whose last save is more than `checkpoint.every_minutes` ago."""
    tokens: float
    """Caption tokens of the global batch."""
    weight: float
    """The same, but each counts as its source's `loss_weight` says."""
    usable: tuple[float, ...]
    """Samples of the step, by source."""
    unusable: tuple[float, ...]
    """Those that could not be used, by source: of bad content, or too long."""
    bad: float
    """Those among them that are of bad content."""
    losses_before: float
    """Token losses of the step before."""


@dataclass(frozen=True)
class EvaluationSums:
    """What the ranks tell each other before a step of an evaluation, as sums over all of them."""

    failed: float
    """Ranks that could not get their samples."""
    leaving: float
    """Ranks that were asked to stop, or know of a later attempt."""


@dataclass
class TakenStep:
    """A step that was taken: its samples on this rank, the sum of their token losses, and the tokens of the
    global batch."""

    step: Step
    losses: OnItsWay
    tokens: float


def train(session: Session, stop: StopFlag, watch: Watch) -> Outcome:
    """Take the steps that are left. Returns SAVED if `stop` was requested on any rank: the state is then on
    disk."""
    training, patience = Training(session, stop, watch), LAST_CHANCE
    try:
        with collected_between_steps() as collect:
            outcome = training.run(collect)
        patience = CLOSE_SECONDS
        return outcome
    except Exception:
        session.checkpoints.drain(LAST_CHANCE)
        raise
    finally:
        training.close(patience)


def fetch(
    coming: Coming[T], nothing: T, stop: StopFlag, sign_of_life: Callable[[], None]
) -> tuple[T, Exception | None]:
    """What comes next; `nothing` if a stop is requested before it is there: no rank takes the step then.

    An error is returned, so that all ranks can learn of it before they leave. Bytes that come are signs of
    life: slow storage is not taken for a hang.
    """
    sign_of_life()
    before = received()
    try:
        while not coming.ready(SLICE):
            if stop.requested:
                return nothing, None
            if received() != before:
                before = received()
                sign_of_life()
        return next(coming), None
    except Exception as error:
        return nothing, error


class Training:
    """The steps of one attempt. All ranks do the same at the same time."""

    def __init__(self, session: Session, stop: StopFlag, watch: Watch) -> None:
        self.session, self.stop, self.watch = session, stop, watch
        self.config, self.world, self.engine = session.config, session.world, session.engine
        self.state, self.records, self.checkpoints = session.state, session.records, session.checkpoints
        self.sources = [source.name for source in session.config.data.sources]
        captioner = session.captioner
        self.monitor = Monitor(
            session.config,
            session.run,
            session.attempt,
            session.world,
            first_step=session.state.step,
            total_steps=session.total_steps,
            sample_flops=lambda sample: step_flops(
                captioner.config, sample.frames // 2, len(sample.tokens.labels)
            ),
            tell=watch,
            stopwatch=session.stopwatch,
        )
        self.clock = self.monitor.clock
        self.evaluation = Evaluation(session, self.monitor, watch.arrive)
        self.profiler = StepProfiler(session.run.profiles, session.world.rank, session.world.device)
        steps = range(session.state.step, session.total_steps)
        loss_weights = torch.tensor([source.loss_weight for source in session.config.data.sources])
        self.loss_weights = loss_weights.to(session.world.device)
        self.feed = Feed(session.loaders.training(steps), session.size, session.world.device, loss_weights)
        self.spikes = SpikeWindow(session.config.monitor.spike_sigma)
        self.tally = Tally(
            session.config,
            session.loaders.order,
            session.loaders.dataset.training.samples_by_source(),
            session.state.step,
            session.total_steps,
        )
        self.skips_in_a_row = 0
        self.saved_at = time.monotonic()
        self.save_is_due = False
        self.metrics: dict[str, float] = {}
        """Of the evaluation of this step, until they are saved."""
        self.taken: TakenStep | None = None

    def run(self, collect: Callable[[int], None]) -> Outcome:
        """Evaluate, save and take steps, until the last one or a stop. collect: takes garbage away, given the
        number of steps taken."""
        while True:
            is_last = self.state.step == self.session.total_steps
            is_best = False
            self.metrics = {}
            if not self.state.evaluated and (is_last or self.is_every(self.config.evaluate.every_steps)):
                evaluation = self.evaluate()
                if evaluation is None:
                    return self.save_and_leave()
                self.metrics = evaluation
                is_best = self.state.step > 0 and self.checkpoints.improve(self.metrics)
            if is_best:
                self.save("best")
            elif is_last:
                self.save("finished")
            elif self.save_is_due or self.is_every(self.config.checkpoint.every_steps):
                self.save("interval")
            if is_last:
                self.checkpoints.finish()
                return Outcome.FINISHED

            fed, error = self.fetch(self.feed, Fed.nothing(self.state.step), Phase.DATA_WAIT)
            # All ranks see the same sums, and so take the same way from here on.
            sums, most_batches = self.agree(fed, error)
            if sums.failed:
                self.leave_together(error)
            if sums.superseded or sums.unsaved:
                self.leave_unsaved()
            if self.taken:
                self.check_loss(self.taken, sums.losses_before)
            if sums.stopping:
                return self.save_and_leave()
            self.save_is_due = sums.overdue > 0
            self.records.note(fed.step)
            self.check_usable(sums)
            # Engines want as many micro-batches of all ranks: empty ones are added.
            missing = most_batches - len(fed.batches)
            empty = [collate([]).to(self.world.device) for _ in range(missing)]
            self.take(fed.step, fed.batches + empty, sums)
            collect(self.state.step)

    def is_every(self, steps: int) -> bool:
        """Whether the number of steps taken is a multiple of `steps`."""
        return self.state.step % steps == 0

    def fetch(self, coming: Coming[T], nothing: T, phase: Phase) -> tuple[T, Exception | None]:
        """What comes next, or the error and `nothing` in its place."""
        return fetch(coming, nothing, self.stop, lambda: self.clock.enter(phase))

    def agree(self, fed: Fed, error: Exception | None) -> tuple[StepSums, int]:
        """The one agreement of a step: all ranks take it, or leave together. Returns the sums over all ranks,
        and the micro-batches of the rank that has the most, at least 1."""
        every_minutes = self.config.checkpoint.every_minutes
        minutes = (time.monotonic() - self.saved_at) / 60
        mine = StepSums(
            failed=error is not None,
            superseded=self.session.lease.lost,
            unsaved=self.checkpoints.failed,
            stopping=self.stop.requested,
            overdue=every_minutes is not None and minutes > every_minutes,
            tokens=fed.tokens,
            weight=fed.weight,
            usable=self.by_source(sample.source for sample in fed.step.samples),
            unusable=self.by_source(self.sources.index(sample.source) for sample in fed.step.rejected),
            bad=sum(1 for sample in fed.step.rejected if sample.bad),
            losses_before=self.taken.losses.read() if self.taken else 0.0,
        )
        self.watch.arrive()
        sums, batches_by_rank = self.world.sum_fields_and_gather(mine, len(fed.batches))
        self.clock.enter(Phase.TRAINING)
        return sums, max(1, *map(int, batches_by_rank))

    def by_source(self, sources: Iterable[int]) -> tuple[float, ...]:
        """How often each source occurs."""
        counts = Counter(sources)
        return tuple(float(counts[number]) for number in range(len(self.sources)))

    def take(self, step: Step, batches: list[Batch], sums: StepSums) -> None:
        """Take a step: forward, backward, update."""
        losses_of_step = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            losses = token_losses(self.engine, batch, self.session.captioner.config, self.engine.dtype)
            losses_of_step += losses.detach().sum()
            if is_last:
                self.taken = TakenStep(step, OnItsWay(losses_of_step), sums.tokens)
            weighted = losses * token_weights(batch, self.loss_weights)
            self.engine.backward(weighted.sum() / (sums.weight or 1.0), last=is_last)
            self.monitor.add(batch, losses)
        lr = learning_rate(self.config.optim, self.state.step, self.session.total_steps)
        self.clock.enter(Phase.SAVING)
        self.checkpoints.hold()
        self.clock.enter(Phase.TRAINING)
        update = self.engine.step(lr)
        self.state.step += 1
        self.state.evaluated = False
        self.check_update(update, step)
        self.monitor.step(step, update, lr, self.records.bad_by_source())
        self.profiler.step(self.state.step)

    def evaluate(self) -> dict[str, float] | None:
        """Validation loss, and captions with their scores. Returns the metrics; None if a stop was
        requested."""
        self.clock.enter(Phase.EVALUATION)
        try:
            metrics = self.evaluation.make(self.fetch_for_evaluation)
        except LeftOff:
            return None
        self.state.evaluated = True
        return metrics

    def fetch_for_evaluation(self, loader: Loader) -> Step:
        """The next step of an evaluation, once all ranks have theirs. Raises LeftOff."""
        nothing = Step(self.state.step, [], [], 0.0)
        step, error = self.fetch(loader, nothing, Phase.EVALUATION)
        self.watch.arrive()
        leaving = self.stop.requested or self.session.lease.lost
        sums = self.world.sum_fields(EvaluationSums(failed=error is not None, leaving=leaving))
        self.clock.enter(Phase.EVALUATION)
        if sums.failed:
            self.leave_together(error)
        if sums.leaving:
            raise LeftOff
        return step

    def save(self, reason: str) -> None:
        """Begin to save in the background."""
        self.clock.enter(Phase.SAVING)
        self.session.save(reason, self.metrics)
        self.metrics = {}
        self.save_is_due, self.saved_at = False, time.monotonic()

    def save_and_leave(self) -> Outcome:
        """Save, sooner than anything else, and wait until it is durable."""
        self.clock.enter(Phase.SAVING)
        if self.world.any(self.session.lease.lost):
            self.leave_unsaved()
        self.session.save("stop", self.metrics, urgent=True)
        self.checkpoints.finish()
        return Outcome.SAVED

    def leave_together(self, error: Exception | None) -> NoReturn:
        """Raise this rank's error, or that of a peer, once the checkpoint under way is durable."""
        try:
            self.checkpoints.finish()
        except EarwitnessError as unsaved:
            raise error or unsaved from unsaved
        raise error or PeerFailed("another rank failed")

    def leave_unsaved(self) -> NoReturn:
        """Raise why this attempt must end as it is: its checkpoint could not be written, or a later attempt
        has taken over, and this one may not write any more."""
        self.checkpoints.finish()
        self.session.lease.check()
        raise PeerFailed("a later attempt has taken over")

    def check_usable(self, sums: StepSums) -> None:
        """Raise UnusableData, PeerFailed on the ranks but 0, if so little can be used that the run must not
        go on."""
        complaint = self.tally.add(sums.usable, sums.unusable, sums.bad)
        if complaint:
            self.checkpoints.finish()
            self.records.refuse(complaint)

    def check_loss(self, taken: TakenStep, losses: float) -> None:
        """Mark a step whose loss stands out, and name its samples. losses: sum over the tokens of the global
        batch."""
        if not taken.tokens:
            return
        loss = losses / taken.tokens
        if self.spikes.stands_out(loss):
            keys = self.gather_keys(taken.step)
            if keys is not None:
                self.session.run.ledger.record(
                    Spike(attempt=self.session.attempt, step=taken.step.number, loss=loss, keys=keys)
                )

    def check_update(self, update: Update, step: Step) -> None:
        """Note a skipped update (the gradient was not finite). Raise EarwitnessError if there were too many
        in a row."""
        if update.applied:
            self.skips_in_a_row = 0
            return
        self.skips_in_a_row += 1
        keys = self.gather_keys(step)
        if keys is not None:
            self.session.run.ledger.record(Skipped(attempt=self.session.attempt, step=step.number, keys=keys))
        if self.skips_in_a_row > self.config.optim.max_skips:
            self.checkpoints.finish()
            raise EarwitnessError(
                f"the gradient was not finite {self.skips_in_a_row} times in a row, up to step {step.number};"
                " stopped, as optim.max_skips says. The last checkpoint is from before;"
                f" `python -m launch status {self.session.run.path} --events` names the samples (skip)."
                " A lower optim.lr or a longer warm-up often helps."
            )

    def gather_keys(self, step: Step) -> list[str] | None:
        """All samples of a step in the order of lanes, on rank 0; None on the others."""
        keys = [sample.key for sample in step.samples]
        by_rank = self.world.gather(dict(zip(step.lanes, keys, strict=True)))
        if by_rank is None:
            return None
        by_lane = {lane: key for of_rank in by_rank for lane, key in of_rank.items()}
        return [by_lane[lane] for lane in sorted(by_lane)]

    def close(self, patience: float) -> None:
        """Give up what is under way, and finish the curves. patience: seconds that trackers get for it."""
        self.feed.close()
        self.profiler.close()
        self.monitor.close(patience)
