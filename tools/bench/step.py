"""The benchmarks of steps: `launch train` on a Whisper with random weights and clips that are made here. All
figures are those that the run itself tells, in its curves."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.errors import ConfigError, EarwitnessError
from configs.run.events import Progress
from configs.run.folder import RunDir
from tools.bench import trace
from tools.bench.made import Preset, prepared
from tools.bench.report import ROOT, Figures, Summary, describe, environment, report, run_module, say, summary
from trainer.distributed import has_bf16

CURVES = {
    "speed/samples_per_second": "samples_per_second",
    "speed/audio_seconds_per_second": "audio_seconds_per_second",
    "speed/mfu": "mfu",
    "speed/useful_mfu": "useful_mfu",
    "speed/data_wait_share": "data_wait_share",
    "step_seconds/data_wait": "data_wait_seconds",
    "step_seconds/training": "training_seconds",
    "step_seconds/saving": "saving_seconds",
    "memory/host_gb": "host_gigabytes",
    "memory/device_gb": "device_gigabytes",
    "memory/device_reserved_gb": "reserved_gigabytes",
}
"""Curves of a run, and what their figures are called here."""


class Backend(StrEnum):
    """Engines, as `engine.backend` names them."""

    zero2 = "zero2"
    fsdp2 = "fsdp2"


class Window(StrEnum):
    """What the encoder sees of a clip, as `data.window` names it."""

    own = "own"
    full = "full"


@dataclass(frozen=True)
class Length:
    """How many steps are taken: the first `warm_up` do not count, `steps` more do."""

    warm_up: int
    steps: int

    @property
    def interval(self) -> int:
        """Steps from one point of the curves to the next, so that one falls on the end of the warm-up, and
        one on the end."""
        return math.gcd(self.warm_up, self.steps)


@dataclass(frozen=True)
class Measured:
    """What a run has told. rounds: figures of each interval of its curves after the warm-up; on a GPU with
    those of a trace, which are the same for all."""

    rounds: Sequence[Figures]
    first_step_seconds: float


PresetOption = Annotated[Preset, typer.Option("--preset", help="Shape of the Whisper.")]
WindowOption = Annotated[
    Window, typer.Option("--window", help="What the encoder sees: a clip alone, or padded to 30 s.")
]
ShareOption = Annotated[
    float | None,
    typer.Option(
        "--full-share", min=0, max=1, help="With own windows, share of padded clips; default the config's."
    ),
]
MicroOption = Annotated[
    str, typer.Option("--micro-seconds", help="Seconds of audio per forward pass, or auto.")
]
SizeOption = Annotated[int, typer.Option("--global-size", min=1, help="Samples of a step, over all ranks.")]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Steps that are measured.")]
WarmUpOption = Annotated[int, typer.Option("--warm-up", min=1, help="Steps before these.")]
ClipsOption = Annotated[int, typer.Option("--clips", min=16, help="Clips that are made.")]
BackendOption = Annotated[Backend, typer.Option("--backend", help="Engine.")]
CompileOption = Annotated[bool, typer.Option("--compile", help="Compile the blocks.")]
CheckpointingOption = Annotated[bool, typer.Option("--checkpointing", help="Checkpoint activations.")]
DirOption = Annotated[Path, typer.Option("--dir", help="Where a temporary folder is made.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Further settings, as for launch train.", metavar="[KEY=VALUE]...")
]


def bench_step(
    overrides: Overrides = None,
    preset: PresetOption = Preset.tiny,
    window: WindowOption = Window.own,
    full_share: ShareOption = None,
    micro_seconds: MicroOption = "auto",
    global_size: SizeOption = 64,
    steps: StepsOption = 20,
    warm_up: WarmUpOption = 5,
    clips: ClipsOption = 512,
    backend: BackendOption = Backend.zero2,
    ranks: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    compile: CompileOption = False,
    checkpointing: CheckpointingOption = False,
    dir: DirOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Measure steps of the real loop: speed, share of the peak, memory, phases."""
    settings = _settings(window, full_share, micro_seconds, global_size, backend, compile, checkpointing)
    with prepared(dir, preset, clips) as config:
        card = measure_card()
        peak = peak_overrides(card, ranks)
        measured = measure(
            config, "step", ranks, Length(warm_up, steps), [*settings, *peak, *(overrides or [])]
        )
    conditions = _conditions(preset, [*settings, *(overrides or [])], clips) | {
        "ranks": ranks,
        "first_step_seconds": round(measured.first_step_seconds, 2),
    }
    tables = {"device": {"alone": summary([card])}, "step": {preset.value: summary(measured.rounds)}}
    report(conditions, tables, {}, as_json=as_json)


def bench_scaling(
    overrides: Overrides = None,
    preset: PresetOption = Preset.tiny,
    ranks: Annotated[str, typer.Option(help="Numbers of processes, as 1,2,4.")] = "1,2,4",
    window: WindowOption = Window.own,
    full_share: ShareOption = None,
    micro_seconds: MicroOption = "auto",
    global_size: SizeOption = 64,
    steps: StepsOption = 20,
    warm_up: WarmUpOption = 5,
    clips: ClipsOption = 512,
    backend: BackendOption = Backend.zero2,
    compile: CompileOption = False,
    checkpointing: CheckpointingOption = False,
    dir: DirOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Measure the same steps on several numbers of ranks; efficiency is that of the first number."""
    numbers = _numbers(ranks)
    settings = _settings(window, full_share, micro_seconds, global_size, backend, compile, checkpointing)
    given = [*settings, *(overrides or [])]
    tables: dict[str, Summary] = {}
    of_first: float | None = None
    with prepared(dir, preset, clips) as config:
        for number in numbers:
            measured = measure(config, f"ranks-{number}", number, Length(warm_up, steps), given)
            of_rank = summary(measured.rounds)["median"]["samples_per_second"] / number
            of_first = of_first or of_rank
            tables[f"ranks {number}"] = summary(
                [
                    {"efficiency": figures["samples_per_second"] / number / of_first, **figures}
                    for figures in measured.rounds
                ]
            )
    report(_conditions(preset, given, clips), {"scaling": tables}, {}, as_json=as_json)


def _numbers(text: str) -> list[int]:
    """Numbers of ranks, as 1,2,4. Raises ConfigError."""
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--ranks {text}: is written as 1,2,4")
    return numbers


def _settings(
    window: Window,
    full_share: float | None,
    micro_seconds: str,
    global_size: int,
    backend: Backend,
    compile: bool,
    checkpointing: bool,
) -> list[str]:
    """The settings of a run that options name, as KEY=VALUE."""
    settings = [
        f"data.window={window.value}",
        f"batch.micro_seconds={micro_seconds}",
        f"batch.global_size={global_size}",
        f"engine.backend={backend.value}",
        f"engine.dtype={dtype()}",
        f"model.compile={str(compile).lower()}",
        f"model.gradient_checkpointing={str(checkpointing).lower()}",
    ]
    if full_share is not None:
        settings.append(f"data.full_share={full_share}")
    return settings


def _conditions(preset: Preset, settings: Sequence[str], clips: int) -> dict[str, Any]:
    return describe("torch", "deepspeed") | {
        "device": device_name(),
        "preset": preset.value,
        "clips": clips,
        **dict(setting.split("=", 1) for setting in settings),
    }


def device_name() -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def dtype() -> str:
    """`bf16` where there is arithmetic for it, else `fp32`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bf16" if has_bf16(device) else "fp32"


def measure_card() -> Figures:
    """Speed of the device at what a step consists of, in a process of its own."""
    say("the device: matrix product, attention, log-mel")
    return dict(json.loads(run_module("tools.bench.card", gpus=True).splitlines()[-1]))


def peak_overrides(card: Figures, ranks: int) -> list[str]:
    """On a CPU the peak of each rank, for MFU: its share of what a large matrix product reaches there."""
    if torch.cuda.is_available():
        return []
    return [f"monitor.peak_tflops={card['matrix_tflops'] / ranks:.4g}"]


def measure(config: Path, name: str, ranks: int, length: Length, overrides: Sequence[str]) -> Measured:
    """Train until enough steps are taken, and kill the run. name: of the run; overrides: KEY=VALUE for
    `launch train`. Raises EarwitnessError if it ends before."""
    run = RunDir(config.parent / name)
    arguments = [
        f"run.name={name}",
        f"run.dir={run.path}",
        f"monitor.every_steps={length.interval}",
        *overrides,
    ]
    command = [sys.executable, "-m", "launch", "train", str(config), *arguments, "--procs", str(ranks)]
    last = length.warm_up + length.steps
    say(f"{ranks} ranks, {last} steps, of which {length.warm_up} do not count")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(gpus=True),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    idle: Figures = {}
    try:
        _await_step(process, last)
        if torch.cuda.is_available():
            say("a trace of three steps more")
            run_module("launch", "profile", run.path)
            idle = trace.idle(trace.read(max(run.profiles.traces(rank=0))))
    finally:
        process.kill()  # its ranks die with it
        process.communicate()
    measured = _read(run, length)
    return replace(measured, rounds=[figures | idle for figures in measured.rounds])


def _await_step(process: subprocess.Popen[str], last: int) -> None:
    """Read the output of a run until that step is reported. Raises EarwitnessError if the run ends before."""
    assert process.stdout
    output = ""
    for line in process.stdout:
        output += line
        step = re.match(r"step (\d+)/", line)
        if step and int(step[1]) >= last:
            return
    raise EarwitnessError(f"the run ended before step {last}:\n{output[-3000:]}")


def read_curves(run: RunDir) -> dict[str, list[Any]]:
    """The points of a run's curves, with their `step`, `value` and `wall_time`, by the curve's name."""
    events = EventAccumulator(str(run.tensorboard), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def _read(run: RunDir, length: Length) -> Measured:
    """The figures of a run, from the end of the warm-up on."""
    curves = read_curves(run)
    figures_by_step: dict[int, Figures] = {}
    for tag, name in CURVES.items():
        for point in curves.get(tag, []):
            if length.warm_up < point.step <= length.warm_up + length.steps:
                figures_by_step.setdefault(point.step, {})[name] = point.value
    progress = run.ledger.read().of(Progress)
    rounds = [figures_by_step[step] for step in sorted(figures_by_step)]
    return Measured(rounds, progress[0].seconds["first_step"])
