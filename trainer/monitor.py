"""What a run shows while it trains: TensorBoard curves and a line on the terminal."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from data.batch import Batch
from data.decode import SAMPLE_RATE
from data.loader import Step
from data.retry import STATS
from trainer.engines import Update
from trainer.evaluate import PanelClip
from trainer.flops import peak_flops, step_flops
from trainer.goodput import Clock, attempts, begin, goodput
from trainer.loss import count_tokens
from trainer.session import Session, Watch

SPIKE_WINDOW = 100
"""Steps that a loss is compared with; the first SPIKE_WINDOW / 5 of an attempt are only collected."""
STORAGE = ("bytes", "requests", "retries", "hedged", "reread", "cached")
"""What is shown of the reads from elsewhere, by all ranks since the attempt began."""
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
        known = np.array(self._losses)
        if not math.isfinite(loss) or (
            len(known) >= SPIKE_WINDOW // 5 and loss > known.mean() + self.sigma * known.std()
        ):
            return True
        self._losses.append(loss)
        return False


class Monitor:
    """Collects what happens on every rank; rank 0 writes it."""

    def __init__(self, session: Session, watch: Watch) -> None:
        self.session, world = session, session.world
        self.every = session.config.monitor.every_steps
        self.names = [source.name for source in session.config.data.sources]
        self.peak = peak_flops(session.config.monitor.peak_tflops, world.device)
        # What the attempts before have drawn and this one draws anew; step 0 is evaluated again, as it is
        # never saved.
        purge_step = session.state.step + 1 if session.state.step else 0
        self.writer = (
            SummaryWriter(str(session.run.tensorboard), purge_step=purge_step) if world.rank == 0 else None
        )
        self.history = session.run.ledger() if self.writer else []
        self.clock = Clock(
            max((line["time"] for line in self.history if line["event"] == "attempt"), default=time.time()),
            lambda phase: watch(phase, session.state.step),
        )
        self.noted, self.noted_step = 0.0, session.state.step
        self.unusable = 0  # bytes of quarantine.jsonl that the curves show
        self._mark_restart()
        self.progress: Progress | None = None
        if world.rank == 0 and sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=Console(file=sys.stdout))
            self.progress.start()
            self.task = self.progress.add_task(
                session.config.run.name, total=session.total_steps, completed=session.state.step, status=""
            )
        self._reset()

    def _reset(self) -> None:
        self.losses = torch.zeros(len(self.names), dtype=torch.float64, device=self.session.world.device)
        self.tokens = torch.zeros_like(self.losses)
        self.samples, self.seconds, self.waited, self.began = 0, 0.0, 0.0, time.perf_counter()

    def add(self, batch: Batch, losses: torch.Tensor) -> None:
        """Count a micro-batch. losses: (B,) sums of its token losses."""
        self.losses.index_add_(0, batch.source, losses.detach().double())
        self.tokens.index_add_(0, batch.source, count_tokens(batch).double())

    def step(self, data: Step, update: Update, lr: float) -> None:
        """End of a step, `session.state.step` being the number of those taken; every `monitor.every_steps` it
        is reported."""
        self.waited += data.waited
        self.samples += len(data.samples)
        self.seconds += sum(sample.seconds for sample in data.samples)
        step = self.session.state.step
        if self.progress:
            self.progress.update(self.task, completed=step)
        self.clock.step()
        due = step % self.every == 0 or step == self.session.total_steps
        if self.clock.steps == 1 or (due and time.monotonic() - self.noted > NOTE_EVERY):
            self._note()
        if due:
            self._report(step, update, lr)
            self._reset()

    def _report(self, step: int, update: Update, lr: float) -> None:
        world, count = self.session.world, len(self.names)
        bad = Counter(one.key.partition("/")[0] for one in self.session.quarantined.values() if one.bad)
        stored = [float(STATS[name]) for name in STORAGE]
        summed = world.sum(
            [
                *self.losses.tolist(),
                *self.tokens.tolist(),
                *(float(bad[name]) for name in self.names),
                *stored,
                self.samples,
                self.seconds,
                self.waited,
            ]
        )
        if self.writer is None:
            return
        losses, tokens, unusable = (summed[start : start + count] for start in (0, count, 2 * count))
        stored, (samples, audio, waited) = summed[3 * count : -3], summed[-3:]
        seconds = time.perf_counter() - self.began
        scalars = {
            f"loss/{name}": loss / n for name, loss, n in zip(self.names, losses, tokens, strict=True) if n
        }
        scalars["loss"] = sum(losses) / max(1.0, sum(tokens))
        scalars |= {"grad_norm": update.grad_norm, "learning_rate": lr, "attempt": self.session.attempt}
        scalars |= {
            "speed/samples_per_second": samples / seconds,
            "speed/audio_seconds_per_second": audio / seconds,
        }
        scalars["speed/data_wait_share"] = waited / world.size / seconds
        if self.peak and samples:
            flops = step_flops(
                self.session.captioner.config, self.session.order.frames // 2, sum(tokens) / samples
            )
            scalars["speed/mfu"] = flops * samples / seconds / (self.peak * world.size)
        scalars |= {
            f"unusable_samples/{name}": value
            for name, value in zip(self.names, unusable, strict=True)
            if value
        }
        scalars |= {
            f"storage/{name}": value for name, value in zip(STORAGE, stored, strict=True) if any(stored)
        }
        scalars["memory/host_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        if world.device.type == "cuda":
            scalars["memory/device_gb"] = torch.cuda.max_memory_allocated(world.device) / 1e9
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        self._show_unusable(step)
        self.writer.flush()
        status = (
            f"loss {scalars['loss']:.4f}  grad norm {update.grad_norm:.3f}  lr {lr:.2e} "
            f" {samples / seconds:.1f} samples/s"
        )
        status += "" if "speed/mfu" not in scalars else f"  MFU {scalars['speed/mfu']:.1%}"
        if self.progress:
            self.progress.update(self.task, status=status)
        else:
            print(
                f"step {step}/{self.session.total_steps}  {status}  data wait"
                f" {scalars['speed/data_wait_share']:.0%}",
                flush=True,
            )

    def _show_unusable(self, step: int) -> None:
        """A table of the samples that could not be used, by source and reason, whenever there are more."""
        path = self.session.run.quarantine
        if self.writer is not None and path.is_file() and (size := path.stat().st_size) != self.unusable:
            self.unusable = size
            rows = [
                f"| {source} | {len(keys):,} | {reason} | {keys[0]} |"
                for (source, reason), keys in self.session.run.unusable().items()
            ]
            self.writer.add_text(
                "unusable_samples",
                "\n".join(["| source | samples | reason | e.g. |", "|---|---|---|---|", *rows]),
                step,
            )

    def _mark_restart(self) -> None:
        """Say in the curves where an attempt begins, and why the one before ended."""
        if self.writer is not None and (found := attempts(self.history, time.time())):
            step = self.session.state.step
            resumed = (
                f", resumed at step {step} after: {found[-2].words or 'nobody knows'}"
                if len(found) > 1
                else ""
            )
            self.writer.add_text("restarts", f"attempt {found[-1].attempt}, {found[-1].place}{resumed}", step)

    def _note(self) -> None:
        """Tell the ledger where this attempt's time went, and the curves where that of the run did."""
        if self.writer is None:
            return
        step, now = self.session.state.step, time.time()
        line = {
            "attempt": self.session.attempt,
            "step": step,
            **self.clock.progress(self.session.config.batch.global_size),
        }
        self.noted = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk; that is told where it matters
            self.session.run.record("progress", **line)
        if step > self.noted_step:  # every step once, on all curves
            self.noted_step = step
            spent = goodput(
                attempts([*self.history, {"event": "progress", "time": now, **line}], now),
                begin(self.history) or now,
                now,
            )
            for name, seconds in spent.items():
                self.writer.add_scalar(f"goodput/{name}", seconds / sum(spent.values()), step)

    def evaluation(self, metrics: dict[str, float], panel: Sequence[PanelClip]) -> None:
        """Report an evaluation; the time that it took does not count for the speed."""
        step = self.session.state.step
        if self.writer is not None and metrics:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
            for number, clip in enumerate(panel):
                self.writer.add_audio(
                    f"panel/{number}", torch.from_numpy(clip.sample.waveform)[None] / 32768, step, SAMPLE_RATE
                )
                self.writer.add_text(
                    f"panel/{number}",
                    f"**said** {clip.caption}\n\n**reference** {clip.sample.caption}\n\n`{clip.sample.key}`",
                    step,
                )
            self.writer.flush()
            self.say(f"step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        self._reset()

    def say(self, text: str) -> None:
        """A line on the terminal, from rank 0."""
        if self.session.world.rank == 0:
            (self.progress.console.print if self.progress else print)(text)

    def close(self) -> None:
        """Finish the terminal line and the curves."""
        if self.progress:
            self.progress.stop()
        self._note()
        if self.writer is not None:
            self.writer.close()
