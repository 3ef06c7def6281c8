"""An evaluation of a run: its validation loss, captions with their scores, and who is told of them."""

from __future__ import annotations

from collections.abc import Callable

from configs.disk import words_of_disk
from configs.run.events import Evaluated
from configs.run.goodput import Phase
from configs.run.predictions import NAME, write_predictions
from trainer.allowance import Allowance
from trainer.evaluate import Evaluator, Fetch, Setup
from trainer.listening import Listener, Listening
from trainer.monitor import Monitor
from trainer.session import Session


class Evaluation:
    """Evaluates a run as it is. All ranks do the same at the same time."""

    def __init__(self, session: Session, monitor: Monitor, arrive: Callable[[], None]) -> None:
        """arrive: called before the ranks wait for each other."""
        self._session, self._monitor = session, monitor
        setup = Setup(
            config=session.config,
            world=session.world,
            captioner=session.captioner,
            loaders=session.loaders,
            records=session.records,
            size=session.size,
            dtype=session.engine.dtype,
        )
        self._evaluator = Evaluator(setup, session.checkpoints.finish)
        self._listener = Listener(setup, lambda: monitor.clock.enter(Phase.EVALUATION), arrive)
        self._allowance = Allowance(session.config, monitor.history, session.world.size)

    def make(self, fetch: Fetch) -> dict[str, float]:
        """Evaluate, and tell the terminal, the trackers, the run's folder and the ledger. Returns the
        metrics. Raises as `fetch` does."""
        session, step = self._session, self._session.state.step
        count = self._clips_to_caption()
        self._monitor.evaluation_begins(self._evaluator.samples, count)
        module = session.engine.evaluation_module()
        module.eval()
        try:
            metrics = self._evaluator.loss(module, fetch)
            said = self._listener.listen(module, fetch, count)
        finally:
            module.train()
        metrics |= said.metrics
        for name, why in said.failed.items():
            self._monitor.say(f"step {step}: no {name}: {why}")
        self._monitor.evaluation(metrics, said)
        if session.world.rank == 0 and metrics:
            self._record(metrics, said)
        return metrics

    def _clips_to_caption(self) -> int:
        session, listener, count = self._session, self._listener, 0
        if session.world.rank == 0:
            step = session.state.step
            progress = self._monitor.clock.progress(session.attempt, step, session.config.batch.global_size)
            count = self._allowance.clips(
                progress.samples_per_second, all_clips=len(listener.rows), panel=listener.panel
            )
            if count < len(listener.rows) and step:
                self._monitor.say(
                    f"step {step}: captions {count} of {len(listener.rows)} clips; all would take more than"
                    f" {session.config.evaluate.share:.0%} of the time (evaluate.share)"
                )
        return session.world.share(count)

    def _record(self, metrics: dict[str, float], said: Listening) -> None:
        run, step = self._session.run, self._session.state.step
        self._allowance.note(len(said.predictions), said.seconds)
        try:
            write_predictions(run.evaluations / NAME.format(step), said.predictions)
        except OSError as error:
            print(f"captions of step {step} are not kept: {words_of_disk(error) or error}", flush=True)
        captions = [
            {"key": clip.sample.key, "reference": clip.sample.caption, "caption": clip.caption}
            for clip in said.panel
        ]
        run.ledger.record(
            Evaluated(
                attempt=self._session.attempt,
                step=step,
                metrics=metrics,
                captions=captions,
                captioned=len(said.predictions),
                captioning_seconds=round(said.seconds, 3),
            )
        )
