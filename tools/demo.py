"""`make demo`: makes sounds and a small Whisper, and takes them all the way to captions on the CPU, with the
commands that any user types."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from configs.errors import EarwitnessError, ExitCode, run_command
from configs.load import load
from tools.sandbox.sounds import write_clips
from tools.sandbox.whisper import make_whisper

ROOT = Path(__file__).parents[1]
FOLDER = Path("demo")
CONFIG = "configs/demo.yaml"
TRAINING, HELD_OUT = 6000, 200  # clips
SEED = 1
SHOWN = 12
"""Held-out clips in the table at the end, wrong ones first."""


def demo(
    data_only: Annotated[
        bool, typer.Option("--data-only", help="Only make the clips, the shards and the model.")
    ] = False,
) -> None:
    """Make clips, pack and index them, train on two processes, stop, resume on one, export, and caption what
    was held out."""
    began = time.monotonic()
    os.chdir(ROOT)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same on every machine
    config = load(CONFIG)
    for folder in (FOLDER, config.run.dir):
        shutil.rmtree(folder, ignore_errors=True)

    _say(
        f"Making {TRAINING:,} clips to train on, {HELD_OUT} with other captions to be held out, and a Whisper"
        " without weights"
    )
    table = write_clips(FOLDER / "clips", TRAINING, HELD_OUT, SEED)
    references = _captions_by_split(table)
    make_whisper(FOLDER / "model", references["train"].values(), width=128, seconds=4)

    _say("Packing them into shards, and looking at every sample once")
    for split in references:
        _run("tools.pack", table, FOLDER / "shards" / split, "--where", f"split={split}")
    _run("tools.index", CONFIG)
    if data_only:
        return

    half = (config.optim.max_steps or 0) // 2
    _say(f"Training on two processes (DeepSpeed ZeRO-2), and stopping with Ctrl-C half way, at step {half}")
    _train(2, stop_at=half)
    _say("Going on where it stopped, on one process")
    _train(1)

    _say("Exporting to a folder that transformers loads, and captioning what was held out")
    _run("tools.export", config.run.dir, FOLDER / "captioner")
    lines = _run("tools.caption", FOLDER / "captioner", FOLDER / "clips/held-out", "--json", quiet=True)
    captioned = [_Captioned.from_json(line, references["held-out"]) for line in lines.splitlines()]
    right = [clip for clip in captioned if clip.is_right]
    wrong = [clip for clip in captioned if not clip.is_right]
    _show_captions([*wrong, *right][:SHOWN])
    print(
        f"\nAll this took {time.monotonic() - began:.0f} s. What to type next (after `source"
        " .venv/bin/activate`):"
    )
    clip = FOLDER / "clips/held-out/00000.flac"
    _show_command("tensorboard --logdir runs", "curves, and clips to listen to with their captions")
    _show_command(
        f"python -m tools.caption {FOLDER}/captioner {clip}",
        "caption a file; this model knows no other sounds",
    )
    _show_command(
        f"python -m tools.inspect {CONFIG}",
        f"what is in the shards; with {config.run.dir}, in its checkpoints",
    )
    _show_command(
        "python -m launch train configs/finetune-clips.yaml",
        'on your own clips: first README.md, "Your own data"',
    )
    _show_command("python -m launch doctor configs/turbo.yaml", "is this machine fit for a large model?")
    _show_command(
        f"python -m launch submit {CONFIG} run.name=on-slurm",
        "the same on a Slurm cluster, real or made here: docs/slurm.md",
    )
    print(f"\nheld-out captions right: {100 * len(right) / len(captioned):.1f} %")


@dataclass(frozen=True)
class _Captioned:
    """A clip with the caption that it was made with, and the caption that the model gives it."""

    file: str
    reference: str
    caption: str

    @classmethod
    def from_json(cls, line: str, references: dict[str, str]) -> _Captioned:
        """From a line of `tools.caption --json`. references: by file."""
        values = json.loads(line)
        file = str(Path(values["path"]).relative_to(FOLDER / "clips"))
        return cls(file, references[file], values["caption"])

    @property
    def is_right(self) -> bool:
        """Whether the two captions are equal, word for word."""
        return self.caption == self.reference


def _captions_by_split(table: Path) -> dict[str, dict[str, str]]:
    """split -> file -> caption."""
    captions: dict[str, dict[str, str]] = {"train": {}, "held-out": {}}
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            captions[row["split"]][row["file"]] = row["caption"]
    return captions


def _show_command(command: str, meaning: str) -> None:
    print(f"  {command:<78}{meaning}")


def _say(text: str) -> None:
    Console(soft_wrap=True).print(f"\n[bold]{text}[/bold]")


def _start(*arguments: object) -> subprocess.Popen[str]:
    print("$ python -m", shlex.join(map(str, arguments)), flush=True)
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)], stdout=subprocess.PIPE, encoding="utf-8"
    )


def _run(*arguments: object, quiet: bool = False) -> str:
    """Run a command of this checkout; returns what it printed. Raises EarwitnessError if it fails."""
    process = _start(*arguments)
    output, _ = process.communicate()
    if not quiet:
        print(output, end="", flush=True)
    _check(process, ExitCode.FINISHED)
    return output


def _train(procs: int, stop_at: int | None = None) -> None:
    """Train to the end, or press Ctrl-C once that step is reported."""
    process = _start("launch", "train", CONFIG, "--procs", procs)
    assert process.stdout is not None
    stop_sent = False
    for line in process.stdout:
        print(line, end="", flush=True)
        step = re.match(r"step (\d+)/", line)
        if step is None or stop_at is None or stop_sent:
            continue
        if int(step[1]) >= stop_at:
            process.send_signal(signal.SIGINT)
            stop_sent = True
    _check(process, ExitCode.FINISHED if stop_at is None else ExitCode.SAVED)


def _check(process: subprocess.Popen[str], wanted: int) -> None:
    if process.wait() != wanted:
        raise EarwitnessError(
            f"that ended with exit code {process.returncode} instead of {wanted}: the reason is printed above"
        )


def _show_captions(clips: list[_Captioned]) -> None:
    table = Table(
        "",
        "held-out clip",
        "reference",
        "caption",
        title="Captions that were never trained on; wrong ones first",
        title_justify="left",
    )
    for clip in clips:
        verdict = "[green]right" if clip.is_right else "[red]wrong"
        table.add_row(verdict, Path(clip.file).name, clip.reference, clip.caption)
    Console(width=110).print(table)


def main() -> None:
    """Run the demo; Ctrl-C may end it at any time."""
    try:
        typer.run(demo)
    except KeyboardInterrupt:  # the commands that it runs have it from the terminal, too
        raise EarwitnessError("stopped; `make demo` begins anew") from None


if __name__ == "__main__":
    run_command(main)
