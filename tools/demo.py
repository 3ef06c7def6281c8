"""`make demo`: makes sounds and a small Whisper, and takes them the whole way on the CPU, by the commands
that anybody types."""

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
    """Make, pack, index, train on two processes, stop, resume on one, export, and caption what was held
    out."""
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
    captions = {
        split: {
            row["file"]: row["caption"]
            for row in csv.DictReader(table.open(encoding="utf-8"))
            if row["split"] == split
        }
        for split in ("train", "held-out")
    }
    make_whisper(FOLDER / "model", captions["train"].values(), width=128, seconds=4)

    _say("Packing them into shards, and looking at every sample once")
    for split in captions:
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
    found = {
        str(Path(line["path"]).relative_to(FOLDER / "clips")): line["caption"]
        for line in map(json.loads, lines.splitlines())
    }
    rows = [(file, caption, found[file]) for file, caption in captions["held-out"].items()]
    _show(sorted(rows, key=lambda row: row[1] == row[2])[:SHOWN])
    print(
        f"\nAll this took {time.monotonic() - began:.0f} s. What to type next (after `source"
        " .venv/bin/activate`):"
    )
    for command, meaning in (
        ("tensorboard --logdir runs", "curves, and clips to listen to with their captions"),
        (
            f"python -m tools.caption {FOLDER}/captioner {FOLDER}/clips/held-out/00000.flac",
            "caption a file; this model knows no other sounds",
        ),
        (
            f"python -m tools.inspect {CONFIG}",
            f"what is in the shards; with {config.run.dir}, in its checkpoints",
        ),
        (
            "python -m launch train configs/finetune-clips.yaml",
            'on your own clips: first README.md, "Your own data"',
        ),
        ("python -m launch doctor configs/turbo.yaml", "is this machine fit for a large model?"),
        (
            f"python -m launch submit {CONFIG} run.name=on-slurm",
            "the same on a Slurm cluster, real or made here: docs/slurm.md",
        ),
    ):
        print(f"  {command:<78}{meaning}")
    print()
    right = sum(reference == caption for _, reference, caption in rows)
    print(f"held-out captions right: {100 * right / len(rows):.1f} %")


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
    said, _ = process.communicate()
    if not quiet:
        print(said, end="", flush=True)
    _check(process, ExitCode.FINISHED)
    return said


def _train(procs: int, stop_at: int | None = None) -> None:
    """Train to the end, or press Ctrl-C once that step is reported."""
    process = _start("launch", "train", CONFIG, "--procs", procs)
    assert process.stdout is not None
    asked = False
    for line in process.stdout:
        print(line, end="", flush=True)
        step = re.match(r"step (\d+)/", line)
        if step and stop_at and int(step[1]) >= stop_at and not asked:
            process.send_signal(signal.SIGINT)
            asked = True
    _check(process, ExitCode.SAVED if stop_at else ExitCode.FINISHED)


def _check(process: subprocess.Popen[str], wanted: int) -> None:
    if process.wait() != wanted:
        raise EarwitnessError(
            f"that ended with exit code {process.returncode} instead of {wanted}: the reason is printed above"
        )


def _show(rows: list[tuple[str, str, str]]) -> None:
    table = Table(
        "",
        "held-out clip",
        "reference",
        "caption",
        title="Captions that were never trained on; wrong ones first",
        title_justify="left",
    )
    for file, reference, caption in rows:
        table.add_row(
            "[green]right" if caption == reference else "[red]wrong", Path(file).name, reference, caption
        )
    Console(width=110).print(table)


def main() -> None:
    """The demo, which Ctrl-C may end at any time."""
    try:
        typer.run(demo)
    except KeyboardInterrupt:  # the commands that it runs have it from the terminal, too
        raise EarwitnessError("stopped; `make demo` begins anew") from None


if __name__ == "__main__":
    run_command(main)
