"""`python -m tools.evaluate MODEL|RUN SHARDS...|CONFIG`: the loss of a captioner, the scores of its captions,
and whether it listens."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from configs.errors import ConfigError, DataError, run_command
from configs.load import validate
from configs.run.crash_journal import CrashJournal
from configs.run.folder import RunDir
from configs.run.predictions import Prediction, write_predictions
from configs.schema import RunConfig
from data import dataset
from data.batch import Size
from data.captions import CaptionEncoder, prefix_tokens
from data.dataset import Dataset
from data.windows import Windows
from tools.arguments import CaptionKeys, StorageOptions, named_data
from tools.caption import Window, trained_window
from trainer import model as base
from trainer import parts
from trainer.checkpoint import Reader
from trainer.distributed import alone, end
from trainer.evaluate import Evaluator, Setup
from trainer.examine import examine
from trainer.listening import Listener
from trainer.loaders import Loaders
from trainer.micro import ON_CPU
from trainer.model import Captioner
from trainer.records import SampleRecords
from trainer.weights import is_model, resolve, take_weights

ON_GPU = 8
"""Whole windows of a forward pass on a GPU: any card holds them."""


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="Folder of an export, a run or a checkpoint.", metavar="MODEL|RUN")
    ],
    names: Annotated[
        list[str],
        typer.Argument(
            help="Shards (paths, URLs, globs, braces), or a config: the validation samples of its sources.",
            metavar="SHARDS...|CONFIG",
        ),
    ],
    clips: Annotated[
        int | None,
        typer.Option(min=0, help="Clips of each source that are captioned.", show_default="all"),
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint of a run.")] = False,
    window: Annotated[
        Window | None,
        typer.Option(help="Captions of clips at their own lengths, or padded; default: as it was trained."),
    ] = None,
    style: Annotated[str | None, typer.Option(help="The style prompt to ask with (for SHARDS).")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="File for what was said of each clip, as tools.report takes it.")
    ] = None,
    caption_key: CaptionKeys = None,
    storage_options: StorageOptions = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a captioner: its loss, and greedy captions with their scores, by source."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = _load(model, best=best)
    with tempfile.TemporaryDirectory(prefix="evaluate-") as folder:
        data, named = named_data(names, caption_key, storage_options=storage_options)
        if style and named:
            raise ConfigError(f"--style {style}: is for SHARDS; a config says the style of each source")
        values: dict[str, Any] = {
            "run": {"name": "evaluation", "dir": folder, "seed": named.run.seed if named else 0},
            "model": {"name_or_path": found.captioner.source},
            "data": data.model_dump(mode="json") | {"window": (window or found.window).value},
            "optim": {"max_steps": 1},
            "evaluate": {
                "captions": 0,
                "scored": sys.maxsize if clips is None else clips,
                "max_samples": sys.maxsize,
                "parts": named.evaluate.parts if named else {},
            },
        }
        if style:
            values["data"]["sources"][0]["style"] = style
        config = validate(values, "SHARDS")
        parts.check(config.evaluate.parts, config.evaluate.best_metric)
        if missing := parts.remark():
            print(missing, file=sys.stderr)
        metrics, said = _evaluate(found, config, is_config=named is not None)
    if as_json:
        print(json.dumps({"metrics": metrics, "captioned": len(said)}))
    else:
        _show(metrics, [source.name for source in config.data.sources], len(said))
    if predictions:
        write_predictions(predictions, said)


@dataclass(frozen=True)
class _Found:
    """A model to evaluate. learnt: tokens that it may say though Whisper bans them."""

    captioner: Captioner
    window: Window
    learnt: list[int]


def _load(source: Path, *, best: bool) -> _Found:
    """Raises ConfigError, CheckpointError."""
    if not source.is_dir():
        raise ConfigError(f"{source}: does not exist; name the folder of an export, a run or a checkpoint")
    if is_model(source):
        if best:
            raise ConfigError(f"--best: is for a run; {source} is a model")
        found = examine(str(source), "MODEL", needs_weights=True)
        for remark in found.remarks:
            print(remark, file=sys.stderr)
        prefix = prefix_tokens(found.tokenizer, found.generation)
        captioner = Captioner(
            found.whisper(torch.float32), str(found.folder), found.tokenizer, found.generation, prefix
        )
        return _Found(captioner, trained_window(found.config), [])
    run, folder = resolve(source, best=best)
    config = run.read_config()
    captioner = base.load_base(run, config.model)
    take_weights(captioner.model, folder)
    return _Found(captioner, Window(config.data.window), Reader(folder).manifest.caption_tokens)


def _evaluate(
    found: _Found, config: RunConfig, *, is_config: bool
) -> tuple[dict[str, float], list[Prediction]]:
    """Metrics as training names them, and what was said of each clip. Raises DataError."""
    captioner = found.captioner
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        world, run = alone(device), RunDir(config.run.dir)
        samples = _samples(config, captioner, is_config=is_config)
        encoder = CaptionEncoder(
            captioner.tokenizer,
            captioner.prefix,
            positions=captioner.config.max_target_positions,
            long_caption=config.data.long_caption,
            styles=[source.style for source in config.data.sources],
        )
        learnt = torch.zeros(captioner.config.vocab_size, dtype=torch.bool)
        learnt[found.learnt] = True
        seconds = captioner.frames / 100
        at_once = ON_CPU if device.type == "cpu" else ON_GPU * seconds
        setup = Setup(
            config,
            world,
            captioner,
            Loaders(
                config,
                world,
                samples,
                encoder,
                samples.order(config),
                Windows.of(config, captioner.frames),
                CrashJournal(64),
                frozenset(),
                captioner.config,
            ),
            SampleRecords(config.data, run, 0, world, learnt),
            Size(at_once, seconds, captioner.config.max_target_positions),
            torch.float32,
        )
        module = captioner.model.to(device).eval()
        metrics = Evaluator(setup, lambda: None).loss(module, next)
        listener = Listener(setup)
        said = listener.listen(module, next, len(listener.rows))
        for name, why in said.failed.items():
            print(f"no {name}: {why}", file=sys.stderr)
        for sample in run.quarantine.read().samples:
            print(f"{sample.key}: {sample.reason}", file=sys.stderr)
        return metrics | said.metrics, said.predictions
    finally:
        end()


def _samples(config: RunConfig, captioner: Captioner, *, is_config: bool) -> Dataset:
    """The samples to evaluate, as the validation part of a data set. Raises DataError."""
    for line in dataset.build(config, config.run.dir, captioner.frames / 100).lines:
        print(line, file=sys.stderr)
    found = dataset.open_dataset(config, config.run.dir)
    if not is_config:
        return Dataset(found.training, found.training)
    if not len(found.validation):
        raise DataError(
            "the config holds nothing out: give data.sources.NAME.validation a share or shards, or name the"
            " shards to evaluate"
        )
    return found


def _show(metrics: dict[str, float], sources: Sequence[str], captioned: int) -> None:
    """A table: a metric per line, all clips and each source in columns."""
    table = Table("", "all", *(sources if len(sources) > 1 else ()), title_justify="left")
    whole = [name for name in metrics if name.count("/") == 1]
    for name in whole:
        figures = [metrics.get(f"{name}/{source}") for source in sources] if len(sources) > 1 else []
        shown = ["" if figure is None else f"{figure:.4g}" for figure in (metrics[name], *figures)]
        table.add_row(name.removeprefix("validation/"), *shown)
    print(f"{captioned} clips captioned")
    Console(width=max(80, 24 + 14 * len(sources))).print(table)


if __name__ == "__main__":
    run_command(lambda: typer.run(evaluate))
