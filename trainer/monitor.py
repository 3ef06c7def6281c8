"""What a run shows while it trains: curves and captions in its trackers, and a line on the terminal."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from configs.metrics import CURVES, is_of_captions
from configs.run.events import AttemptBegan, FirstStep
from configs.run.folder import RunDir
from configs.run.goodput import BUSY, Clock, Phase, begin, goodput, summarize
from configs.run.ledger import History
from configs.run.stopwatch import Stopwatch
from configs.schema import RunConfig
from data.batch import Batch, Sample
from data.loader import Step
from data.retry import STATS
from data.windows import HOP
from trainer.distributed import World
from trainer.engines import Update
from trainer.flops import peak_flops
from trainer.listening import Listening
from trainer.loss import SourceTotals
from trainer.panel import Panel, flat
from trainer.trackers import Tracker, open_trackers

if TYPE_CHECKING:
    from rich.progress import Progress

SPIKE_WINDOW = 100
"""Steps that a loss is compared with; the first SPIKE_WINDOW / 5 of an attempt are only collected."""
STORAGE = ("bytes", "requests", "retries", "hedged", "reread", "cached")
"""What is shown of the reads from elsewhere, by all ranks since the attempt began."""
SAID = tuple(f"{CURVES}{name}" for name in ("cider_d", "rouge_l", "repetition_rate", "discrimination"))
"""What the terminal tells of an evaluation, beside losses; the rest is in the curves."""
NOTE_EVERY = 30.0
"""Seconds after which the ledger is told where the time went: so much of it a kill can hide."""


class SpikeWindow:
    """Tells losses that stand out from those of the steps before."""

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def stands_out(self, loss: float) -> bool:
        """Whether a step's loss is more than `sigma` standard deviations above the mean, or not finite; it
        joins the window otherwise."""
        if not math.isfinite(loss):
            return True
        known = np.array(self._losses)
        if len(known) >= SPIKE_WINDOW // 5 and loss > known.mean() + self.sigma * known.std():
            return True
        self._losses.append(loss)
        return False


@dataclass(frozen=True)
class Totals:
    """Numbers since the last point of the curves, summed over all ranks. flops: that the model took;
    useful_flops: those for frames that hold sound; waited: seconds for data."""

    samples: float
    flops: float
    useful_flops: float
    audio_seconds: float
    waited: float


class Monitor:
    """Collects what happens on every rank; rank 0 writes it."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        attempt: int,
        world: World,
        *,
        first_step: int,
        total_steps: int,
        sample_flops: Callable[[Sample], float],
        tell: Callable[[Phase, int], None],
        stopwatch: Stopwatch,
    ) -> None:
        """first_step: steps taken before; sample_flops: FLOPs that a sample takes in a training step; tell:
        is told of each phase and the step that it belongs to; stopwatch: of this start."""
        self._config, self._run, self._attempt, self._world = config, run, attempt, world
        self._names = [source.name for source in config.data.sources]
        self._sample_flops, self._peak = sample_flops, peak_flops(config.monitor.peak_tflops, world.device)
        self._step, self._total_steps = first_step, total_steps
        self._trackers: Tracker | None = None
        self._history = History([])
        self._progress: Progress | None = None
        self._noted_at, self._noted_step = 0.0, first_step
        self._stopwatch = stopwatch
        self._quarantine_bytes = 0
        """Of the quarantine that the curves show."""
        if world.rank == 0:
            self._history = run.ledger.read()
            self._trackers = open_trackers(config, run, self._history, first_step)
            self._panel = Panel(self._trackers, self._history, first_step)
            self._mark_restart()
            if sys.stdout.isatty():
                self._progress = self._open_terminal()
        began = self._history.last(AttemptBegan)
        self.clock = Clock(began.time if began else time.time(), lambda phase: tell(phase, self._step))
        self._reset()
        stopwatch.lap("monitor")

    def add(self, batch: Batch, losses: torch.Tensor) -> None:
        """Count a micro-batch. losses: (T,) of its tokens."""
        self._totals.add(batch, losses)

    def step(self, data: Step, update: Update, lr: float, unusable: Counter[str]) -> None:
        """Count a step; every `monitor.every_steps` it is reported. unusable: samples that this rank could
        not use in this attempt, by source."""
        self._waited += data.waited
        self._samples += len(data.samples)
        self._flops += sum(map(self._sample_flops, data.samples))
        self._useful_flops += sum(self._sample_flops(_without_padding(clip)) for clip in data.samples)
        self._seconds += sum(sample.seconds for sample in data.samples)
        self._step = data.number + 1
        if self._progress:
            self._progress.update(self._task, completed=self._step)
        self.clock.step()
        is_due = self._step % self._config.monitor.every_steps == 0 or self._step == self._total_steps
        if self.clock.steps == 1 or (is_due and time.monotonic() - self._noted_at > NOTE_EVERY):
            self._note()
        if self.clock.steps == 1:
            self._tell_first_step()
        if is_due:
            self._report(update, lr, unusable)
            self._reset()

    @property
    def history(self) -> History:
        """What the ledger had when this attempt began; on rank 0."""
        return self._history

    def evaluation_begins(self, samples: int, captions: int) -> None:
        """Say so where an attempt has said nothing of a step yet: it may take minutes."""
        if self._trackers and samples and not self.clock.steps:
            self.say(f"step {self._step}: evaluates {samples} samples, and captions {captions}, first")

    def evaluation(self, metrics: dict[str, float], said: Listening) -> None:
        """Report an evaluation; the time that it took does not count for the speed."""
        if self._trackers and metrics:
            self._trackers.scalars(metrics, self._step)
            self._panel.show(said.panel, said.predictions, self._step)
            self._trackers.flush()
            told = {
                name: value for name, value in metrics.items() if not is_of_captions(name) or name in SAID
            }
            values = "  ".join(f"{name} {value:.4f}" for name, value in told.items())
            self.say(f"step {self._step}: {values}")
        self._reset()

    def close(self, patience: float) -> None:
        """Finish the terminal line and the trackers. patience: seconds that these get for it."""
        if self._progress:
            self._progress.stop()
        self._note()
        if self._trackers:
            self._trackers.close(patience)

    def _open_terminal(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=Console(file=sys.stdout),
        )
        progress.start()
        name = self._config.run.name
        self._task = progress.add_task(name, total=self._total_steps, completed=self._step, status="")
        return progress

    def _reset(self) -> None:
        self._totals = SourceTotals.zeros(len(self._names), self._world.device)
        self._samples, self._flops, self._useful_flops, self._seconds, self._waited = 0, 0.0, 0.0, 0.0, 0.0
        self._phases = dict(self.clock.seconds)
        self._since_step = self._step
        self._since = time.perf_counter()

    def _report(self, update: Update, lr: float, unusable: Counter[str]) -> None:
        by_source = self._totals.over_ranks(self._world)
        totals = self._world.sum_fields(
            Totals(self._samples, self._flops, self._useful_flops, self._seconds, self._waited)
        )
        unusable_samples = self._world.sum([float(unusable[name]) for name in self._names])
        storage = self._world.sum([float(STATS[name]) for name in STORAGE])
        if self._trackers is None:
            return
        seconds = time.perf_counter() - self._since
        scalars = by_source.means(self._names, "loss")
        scalars |= {"grad_norm": update.grad_norm, "learning_rate": lr, "attempt": self._attempt}
        scalars |= self._speeds(totals, seconds)
        for name, count in zip(self._names, unusable_samples, strict=True):
            if count:
                scalars[f"unusable_samples/{name}"] = count
        if any(storage):
            scalars |= {f"storage/{name}": value for name, value in zip(STORAGE, storage, strict=True)}
        scalars["memory/host_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        if self._world.device.type == "cuda":
            scalars["memory/device_gb"] = torch.cuda.max_memory_allocated(self._world.device) / 1e9
            scalars["memory/device_reserved_gb"] = torch.cuda.max_memory_reserved(self._world.device) / 1e9
        self._trackers.scalars(scalars, self._step)
        with contextlib.suppress(OSError):  # the quarantine cannot be read for now
            self._show_unusable(self._trackers)
        self._trackers.flush()
        self._show_status(scalars)

    def _speeds(self, totals: Totals, seconds: float) -> dict[str, float]:
        speeds = {
            "speed/samples_per_second": totals.samples / seconds,
            "speed/audio_seconds_per_second": totals.audio_seconds / seconds,
            "speed/data_wait_share": totals.waited / self._world.size / seconds,
        }
        for phase in BUSY:
            spent = self.clock.seconds[phase] - self._phases[phase]
            speeds[f"step_seconds/{phase}"] = spent / (self._step - self._since_step)
        if self._peak and totals.samples:
            peak = self._peak * self._world.size
            speeds["speed/mfu"] = totals.flops / seconds / peak
            speeds["speed/useful_mfu"] = totals.useful_flops / seconds / peak
        return speeds

    def _show_status(self, scalars: dict[str, float]) -> None:
        """The line on the terminal."""
        loss = f"loss {scalars['loss']:.4f}" if "loss" in scalars else "no loss: no sample could be used"
        status = (
            f"{loss}  grad norm {scalars['grad_norm']:.3f}"
            f"  lr {scalars['learning_rate']:.2e}  {scalars['speed/samples_per_second']:.1f} samples/s"
        )
        if "speed/mfu" in scalars:
            status += f"  MFU {scalars['speed/mfu']:.1%}"
        if self._progress:
            self._progress.update(self._task, status=status)
            return
        wait = scalars["speed/data_wait_share"]
        print(f"step {self._step}/{self._total_steps}  {status}  data wait {wait:.0%}", flush=True)

    def _show_unusable(self, trackers: Tracker) -> None:
        """A table of the samples that could not be used, by source and reason, whenever there are more."""
        size = self._run.quarantine.size()
        if size == self._quarantine_bytes:
            return
        self._quarantine_bytes = size
        table = ["| source | samples | reason | e.g. |", "|---|---|---|---|"]
        for (source, reason), keys in self._run.quarantine.read().by_reason().items():
            table.append(f"| {source} | {len(keys):,} | {flat(reason)} | {flat(keys[0])} |")
        trackers.text("unusable_samples", "\n".join(table), self._step)

    def _mark_restart(self) -> None:
        """Say in the curves where an attempt begins, and why the one before ended."""
        attempts = summarize(self._history, time.time())
        if self._trackers is None or not attempts:
            return
        text = f"attempt {attempts[-1].attempt}, {attempts[-1].place}"
        if len(attempts) > 1:
            text += f", resumed at step {self._step} after: {attempts[-2].words or 'nobody knows'}"
        self._trackers.text("restarts", text, self._step)

    def _tell_first_step(self) -> None:
        """Tell the ledger where the seconds until now went."""
        before = (Phase.EVALUATION, Phase.SAVING, Phase.DATA_WAIT)
        spent = {phase.value: self.clock.seconds[phase] for phase in before if self.clock.seconds[phase]}
        self._stopwatch.lap(Phase.FIRST_STEP.value, less=spent)
        if self._world.rank == 0:
            seconds = {part: round(spent, 3) for part, spent in self._stopwatch.seconds.items()}
            with contextlib.suppress(OSError):  # as in _note
                self._run.ledger.record(FirstStep(attempt=self._attempt, step=self._step, seconds=seconds))

    def _note(self) -> None:
        """Tell the ledger where this attempt's time went, and the curves where that of the run did."""
        if self._trackers is None:
            return
        progress = self.clock.progress(self._attempt, self._step, self._config.batch.global_size)
        self._noted_at = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk; that is told where it matters
            self._run.ledger.record(progress)
        if self._step == self._noted_step:  # every step once, on all curves
            return
        self._noted_step = self._step
        history = History([*self._history.events, progress])
        spent = goodput(summarize(history, progress.time), begin(history) or progress.time, progress.time)
        shares = {f"goodput/{name}": seconds / sum(spent.values()) for name, seconds in spent.items()}
        self._trackers.scalars(shares, self._step)

    def say(self, text: str) -> None:
        """A line on the terminal."""
        if self._progress:
            self._progress.console.print(text)
        else:
            print(text, flush=True)


def _without_padding(sample: Sample) -> Sample:
    """The same sample without frames that hold no sound."""
    return replace(sample, frames=min(sample.frames, 2 * max(1, -(-len(sample.waveform) // (2 * HOP)))))
