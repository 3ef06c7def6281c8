"""The training loop, from fetching a step to saving it."""

from __future__ import annotations

import math
import time
from enum import Enum
from typing import Protocol

from configs.errors import DataError, EarwitnessError
from configs.rundir import append_line
from data.batch import micro_batches
from data.captions import IGNORED
from data.loader import Loader, Step
from trainer.distributed import PeerFailed
from trainer.engines import Update
from trainer.evaluate import caption_panel, validation_loss
from trainer.loss import count_tokens, token_losses
from trainer.monitor import Monitor
from trainer.optim import learning_rate
from trainer.session import Session


class Outcome(Enum):
    """How a run ended, if not by an error."""

    FINISHED = "finished"
    SAVED = "saved"


class StopFlag(Protocol):
    """Says whether somebody asked this process to stop."""

    @property
    def requested(self) -> bool:
        """Whether to save and leave."""


def train(session: Session, stop: StopFlag) -> Outcome:
    """Take the steps that are left. Returns SAVED if `stop` was requested on any rank: the state is then on disk."""
    config, state, world = session.config, session.state, session.world
    loader, monitor = session.loader(), Monitor(session)
    bad, skips, due, saved_at = 0, 0, 0.0, time.monotonic()
    try:
        while True:
            last, is_best = state.step == session.total_steps, False
            metrics: dict[str, float] = {}
            if not state.evaluated and (last or state.step % config.evaluate.every_steps == 0):
                if (evaluation := evaluate(session, monitor, stop)) is None:
                    session.save("stop", {})
                    return Outcome.SAVED
                metrics, is_best = evaluation
            if is_best or due or last or state.step % config.checkpoint.every_steps == 0:
                session.save("best" if is_best else "finished" if last else "interval", metrics)
                due, saved_at = 0.0, time.monotonic()
            if last:
                return Outcome.FINISHED

            step, error = fetch(loader, state.step)
            batches = micro_batches(step.samples, config.batch.micro_size, session.micro_batches, session.order.window(state.step), session.pad_id)
            tokens = sum(int(count_tokens(batch).sum()) for batch in batches)
            rejected = sum(one.bad for one in step.rejected)
            minutes = (time.monotonic() - saved_at) / 60
            overdue = config.checkpoint.every_minutes is not None and minutes > config.checkpoint.every_minutes
            # The one agreement of a step: all ranks take it, or leave together.
            tokens_all, stopping, failed, rejected_all, due = world.sum([tokens, stop.requested, error is not None, rejected, overdue])
            if error is not None:
                raise error
            if failed:
                raise PeerFailed("another rank failed")
            if stopping:
                session.save("stop", {})
                return Outcome.SAVED
            record_samples(session, step)
            bad += int(rejected_all)
            check_bad(session, bad)

            for number, batch in enumerate(batches):
                batch = batch.to(world.device)
                losses = token_losses(session.engine, batch, session.captioner.config.num_mel_bins, session.engine.dtype)
                session.engine.backward(losses.sum() / max(1.0, tokens_all), last=number == len(batches) - 1)
                monitor.add(batch, losses)
            lr = learning_rate(config.optim, state.step, session.total_steps)
            update = session.engine.step(lr)
            state.step += 1
            state.evaluated = False
            skips = 0 if update.applied else skips + 1
            check_update(session, update, skips, step)
            monitor.step(step, update, lr)
    finally:
        loader.close()
        monitor.close()


def fetch(loader: Loader, number: int) -> tuple[Step, Exception | None]:
    """The next step's samples; an error is returned, so that all ranks can learn of it before they leave."""
    try:
        return next(loader), None
    except Exception as error:
        return Step(number, [], [], 0.0), error


def evaluate(session: Session, monitor: Monitor, stop: StopFlag) -> tuple[dict[str, float], bool] | None:
    """Validation loss and the panel of captions. Returns the metrics and whether they are the best yet; None if a stop was requested."""
    state = session.state
    metrics = validation_loss(session, interrupted=lambda: session.world.sum([stop.requested])[0] > 0)
    if metrics is None:
        return None
    panel = caption_panel(session)
    monitor.evaluation(metrics, panel)
    value = metrics.get(session.config.evaluate.best_metric, math.inf)
    is_best = state.step > 0 and value < state.best
    state.best = value if is_best else state.best
    state.evaluated = True
    if session.world.rank == 0 and metrics:
        captions = [{"key": clip.sample.key, "reference": clip.sample.caption, "caption": clip.caption} for clip in panel]
        session.run.record("evaluation", step=state.step, **metrics, captions=captions)
    return metrics, is_best


def record_samples(session: Session, step: Step) -> None:
    """Note the tokens of the captions; name the samples that could not be used, and with `data.audit` all samples, before the step is taken."""
    for sample in step.samples:
        session.caption_tokens[[token for token in sample.tokens.labels if token != IGNORED]] = True
    about = {"step": step.number, "attempt": session.attempt, "rank": session.world.rank}
    session.quarantine(step.rejected, step=step.number)
    session.note_cut(step.samples)
    if session.config.data.audit:
        line = {**about, "keys": [sample.key for sample in step.samples]}
        rejected = {"rejected": [one.key for one in step.rejected]} if step.rejected else {}
        append_line(session.run.audit / f"rank-{session.world.rank:05d}.jsonl", line | rejected)


def check_bad(session: Session, bad: int) -> None:
    """Raises DataError if more samples were bad in this attempt than the configuration allows."""
    fraction = session.config.data.max_bad_fraction
    if bad > fraction * max(1000, session.state.step * session.config.batch.global_size):
        reasons = session.explain([one for one in session.quarantined.values() if one.bad])
        raise DataError(f"{bad} samples could not be used, more than data.max_bad_fraction={fraction:g} allows. {reasons}")


def check_update(session: Session, update: Update, skips: int, step: Step) -> None:
    """Note a skipped update (the gradient was not finite). Raises EarwitnessError if there were too many in a row."""
    if update.applied:
        return
    session.run.record("skip", step=step.number, rank=session.world.rank, keys=[sample.key for sample in step.samples])
    if skips > session.config.optim.max_skips:
        raise EarwitnessError(
            f"the gradient was not finite {skips} times in a row, up to step {step.number}; stopped, as optim.max_skips says. "
            f"The last checkpoint is from before; {session.run.events} names the samples. A lower optim.lr or a longer warm-up often helps."
        )
