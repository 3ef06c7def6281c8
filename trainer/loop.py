"""The training loop, from fetching a step to saving it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn

import torch

from configs.errors import DataError, EarwitnessError
from configs.rundir import append_line
from data.batch import micro_batches
from data.captions import IGNORED
from data.loader import Loader, Step
from data.retry import received
from trainer.distributed import PeerFailed
from trainer.engines import Update
from trainer.evaluate import caption_panel, validation_loss
from trainer.goodput import Clock
from trainer.loss import count_tokens, token_losses
from trainer.monitor import Monitor, SpikeWindow
from trainer.optim import learning_rate
from trainer.session import Session, StopFlag, Watch

LAST_CHANCE = 5.0
"""Seconds that a checkpoint under way gets when this rank has failed."""
SLICE = 1.0
"""Seconds after which a rank that waits for samples looks whether a stop is requested."""


class Outcome(Enum):
    """How a run ended, if not by an error."""

    FINISHED = "finished"
    SAVED = "saved"


@dataclass
class Taken:
    """A step that was taken: its samples on this rank, the sum of their token losses, and the tokens of the
    global batch."""

    step: Step
    losses: torch.Tensor
    tokens: float


def train(session: Session, stop: StopFlag, watch: Watch) -> Outcome:
    """Take the steps that are left. Returns SAVED if `stop` was requested on any rank: the state is then on
    disk."""
    config, state, world = session.config, session.state, session.world
    loader, monitor, spikes = (
        session.loader(),
        Monitor(session, watch),
        SpikeWindow(config.monitor.spike_sigma),
    )
    bad, skips, first, due, saved_at = 0, 0, state.step, 0.0, time.monotonic()
    clock = monitor.clock
    taken: Taken | None = None
    try:
        while True:
            last, is_best = state.step == session.total_steps, False
            metrics: dict[str, float] = {}
            if not state.evaluated and (last or state.step % config.evaluate.every_steps == 0):
                clock("evaluation")
                if (evaluation := evaluate(session, monitor, stop, watch)) is None:
                    return save_and_leave(session, clock)
                metrics, is_best = evaluation
            if is_best or due or last or state.step % config.checkpoint.every_steps == 0:
                clock("saving")
                session.save("best" if is_best else "finished" if last else "interval", metrics)
                due, saved_at, metrics = 0.0, time.monotonic(), {}
            if last:
                session.writer.finish()
                return Outcome.FINISHED

            step, error = fetch(loader, state.step, stop, clock, "data_wait")
            batches = micro_batches(
                step.samples,
                config.batch.micro_size,
                session.micro_batches,
                session.order.window(state.step),
                session.pad_id,
            )
            minutes = (time.monotonic() - saved_at) / 60
            # The one agreement of a step: all ranks take it, or leave together.
            watch.arrive()
            agreed = world.sums(
                tokens=sum(int(count_tokens(batch).sum()) for batch in batches),
                stopping=stop.requested,
                failed=error is not None,
                superseded=session.lease.lost,
                unsaved=session.writer.failed,
                bad=sum(one.bad for one in step.rejected),
                overdue=config.checkpoint.every_minutes is not None
                and minutes > config.checkpoint.every_minutes,
                losses_before=float(taken.losses) if taken else 0.0,
            )
            clock("training")
            if agreed.failed:
                leave_together(session, error)
            if agreed.superseded or agreed.unsaved:
                give_way(session)
            if taken:
                check_loss(session, spikes, taken, agreed.losses_before)
            if agreed.stopping:
                return save_and_leave(session, clock, metrics)
            due = agreed.overdue
            record_samples(session, step)
            bad += int(agreed.bad)
            check_bad(session, bad, first)

            taken = Taken(step, torch.zeros((), dtype=torch.float64, device=world.device), agreed.tokens)
            for number, batch in enumerate(batches):
                batch = batch.to(world.device)
                losses = token_losses(
                    session.engine, batch, session.captioner.config.num_mel_bins, session.engine.dtype
                )
                session.engine.backward(
                    losses.sum() / max(1.0, agreed.tokens), last=number == len(batches) - 1
                )
                taken.losses += losses.detach().sum()
                monitor.add(batch, losses)
            lr = learning_rate(config.optim, state.step, session.total_steps)
            clock("saving")
            session.writer.hold()
            clock("training")
            update = session.engine.step(lr)
            state.step += 1
            state.evaluated = False
            skips = 0 if update.applied else skips + 1
            check_update(session, update, skips, step)
            monitor.step(step, update, lr)
    except Exception:
        session.writer.drain(LAST_CHANCE)
        raise
    finally:
        loader.close()
        monitor.close()


def save_and_leave(session: Session, clock: Clock, metrics: dict[str, float] | None = None) -> Outcome:
    """Save, sooner than anything else, and wait until it is durable. metrics: of this step, if it has been
    evaluated."""
    clock("saving")
    if session.world.sum([session.lease.lost])[0]:
        give_way(session)
    session.save("stop", metrics or {}, urgent=True)
    session.writer.finish()
    return Outcome.SAVED


def leave_together(session: Session, error: Exception | None) -> NoReturn:
    """Raise this rank's error, or that of a peer, once the checkpoint under way is durable."""
    session.writer.finish()
    raise error or PeerFailed("another rank failed")


def give_way(session: Session) -> None:
    """Raise why this attempt must end: a checkpoint that could not be written, or a later attempt."""
    session.writer.finish()
    session.lease.check()
    raise PeerFailed("a later attempt has taken over")


def fetch(
    loader: Loader, number: int, stop: StopFlag, clock: Callable[[str], None], phase: str
) -> tuple[Step, Exception | None]:
    """The next step's samples; none if a stop is requested before they are there: no rank takes the step
    then.

    An error is returned, so that all ranks can learn of it before they leave. Bytes that come are a sign of
    life in this phase: slow storage is not taken for a hang.
    """
    nothing = Step(number, [], [], 0.0)
    clock(phase)
    before = received()
    try:
        while not loader.ready(SLICE):
            if stop.requested:
                return nothing, None
            if received() != before:
                before = received()
                clock(phase)
        return next(loader), None
    except Exception as error:
        return nothing, error


def evaluate(
    session: Session, monitor: Monitor, stop: StopFlag, watch: Watch
) -> tuple[dict[str, float], bool] | None:
    """Validation loss and the panel of captions. Returns the metrics and whether they are the best yet; None
    if a stop was requested."""
    state, module = session.state, session.engine.evaluation_module()

    def take(loader: Loader) -> Step | None:
        step, error = fetch(loader, state.step, stop, monitor.clock, "evaluation")
        watch.arrive()
        agreed = session.world.sums(failed=error is not None, leaving=stop.requested or session.lease.lost)
        monitor.clock("evaluation")
        if agreed.failed:
            leave_together(session, error)
        return None if agreed.leaving else step

    metrics = validation_loss(session, module, take)
    panel = None if metrics is None else caption_panel(session, module, take)
    if metrics is None or panel is None:
        return None
    monitor.evaluation(metrics, panel)
    value = metrics.get(session.config.evaluate.best_metric, math.inf)
    is_best = state.step > 0 and value < state.best
    state.best = value if is_best else state.best
    state.evaluated = True
    if session.world.rank == 0 and metrics:
        captions = [
            {"key": clip.sample.key, "reference": clip.sample.caption, "caption": clip.caption}
            for clip in panel
        ]
        session.run.record("evaluation", step=state.step, **metrics, captions=captions)
    return metrics, is_best


def record_samples(session: Session, step: Step) -> None:
    """Note the tokens of the captions; name the samples that could not be used, and with `data.audit` all
    samples, before the step is taken."""
    for sample in step.samples:
        session.caption_tokens[[token for token in sample.tokens.labels if token != IGNORED]] = True
    about = {"step": step.number, "attempt": session.attempt, "rank": session.world.rank}
    session.quarantine(step.rejected, step=step.number)
    session.note_cut(step.samples)
    if session.config.data.audit:
        line = {**about, "keys": [sample.key for sample in step.samples]}
        rejected = {"rejected": [one.key for one in step.rejected]} if step.rejected else {}
        append_line(session.run.audit / f"rank-{session.world.rank:05d}.jsonl", line | rejected)


def check_bad(session: Session, bad: int, first: int) -> None:
    """Raises DataError if more samples were bad in this attempt, whose first step was `first`, than the
    configuration allows."""
    fraction = session.config.data.max_bad_fraction
    if bad > fraction * max(1000, (session.state.step - first) * session.config.batch.global_size):
        session.writer.finish()
        reasons = session.explain([one for one in session.quarantined.values() if one.bad])
        raise DataError(
            f"{bad} samples could not be used, more than data.max_bad_fraction={fraction:g} allows. {reasons}"
        )


def check_loss(session: Session, spikes: SpikeWindow, taken: Taken, losses: float) -> None:
    """Mark a step whose loss stands out, and name its samples. losses: sum over the tokens of the global
    batch."""
    loss = losses / max(1.0, taken.tokens)
    if spikes.stands_out(loss):
        record_keys(session, "spike", taken.step, loss=loss)


def check_update(session: Session, update: Update, skips: int, step: Step) -> None:
    """Note a skipped update (the gradient was not finite). Raises EarwitnessError if there were too many in a
    row."""
    if update.applied:
        return
    record_keys(session, "skip", step)
    if skips > session.config.optim.max_skips:
        session.writer.finish()
        raise EarwitnessError(
            f"the gradient was not finite {skips} times in a row, up to step {step.number}; stopped, as"
            f" optim.max_skips says. The last checkpoint is from before; {session.run.events} names the"
            " samples. A lower optim.lr or a longer warm-up often helps."
        )


def record_keys(session: Session, event: str, step: Step, **about: float) -> None:
    """Name all samples of a step in the ledger, in the order of lanes."""
    gathered: Any = session.world.gather([sample.key for sample in step.samples])
    if gathered is not None:
        keys = [key for of_rank in gathered for key in of_rank]
        session.run.record(event, step=step.number, **about, keys=keys)
