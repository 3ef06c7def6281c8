"""The benchmark of training: this trainer, in one or more ways, and transformers' Seq2SeqTrainer, in turn, on
the same clips."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shlex
import shutil
import statistics
import tempfile
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import yaml
from rich.console import Console
from rich.table import Table

from configs.errors import ConfigError
from configs.load import dump, load
from configs.run.events import TrainingBegan
from configs.run.folder import RunDir
from configs.schema import Data, RunConfig
from tools.bench.captioned import clips_of, judge, tables_of
from tools.bench.report import Aim, describe, grouped, run_module, say, verdicts
from tools.bench.seq2seq import Task
from tools.bench.step import DirOption, JsonOption, Window, WindowOption, device_name, dtype, read_curves

Number = TypeVar("Number", int, float)

GLOBAL_BATCH = 16
RESULTS = "results.jsonl"
TRAINER = "Seq2SeqTrainer"
SHARE = float(Data.model_fields["full_share"].default)
DECIDED = {
    "run.": "--seeds, --dir",
    "model.name_or_path": "MODEL",
    "data.audit": "samples are counted by it",
    "data.window": "--window",
    "data.full_share": "--shares",
}
"""Settings, or what they begin with, that `--with` may not change, and what says them."""
MOST_TIME = {"own": 1 / 3, "full": 1 / 1.15}
"""The most that Earwitness may take of the Trainer's seconds per sample, by window."""
CIDER = "cider_d"
SCORES = (CIDER, "exact_match", "length_ratio", "repetition_rate", "discrimination")
"""Of captions, those that the table has, the first one by source, too."""
MOST_LOSS = 0.85
"""The most that its validation loss at own windows may be of the Trainer's."""


class Which(StrEnum):
    """Whose training."""

    ours = "ours"
    trainer = "trainer"


@dataclass(frozen=True)
class Recipe:
    """What both train alike. max_steps: instead of epochs, if it is not 0."""

    model: str
    clips: str
    epochs: int
    max_steps: int
    lr: float


@dataclass(frozen=True)
class Method:
    """A way to train. window, full_share: as `data.window` and `data.full_share` name them; the Trainer has
    full windows alone, and one process; overrides: other settings of a run, as `launch train` takes them."""

    who: Which
    window: str
    full_share: float = 1.0
    ranks: int = 1
    overrides: str = ""

    @property
    def settings(self) -> list[str]:
        """The overrides one by one, divided as a shell does it. Raises ConfigError."""
        try:
            return shlex.split(self.overrides)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def name(self) -> str:
        """In tables."""
        if self.who is Which.trainer:
            return TRAINER
        windows = f"own windows, {self.full_share:g} full" if self.window == "own" else "full windows"
        return ", ".join(
            filter(None, (windows, f"{self.ranks} ranks" if self.ranks > 1 else "", self.overrides))
        )


@dataclass(frozen=True)
class Trained:
    """What a training has given. seconds: from the beginning of training to the end of its last step; losses:
    of the judge, at full windows; scores: of captions, if they were asked for, by their metrics' names."""

    method: Method
    seed: int
    recipe: Recipe
    conditions: dict[str, Any]
    steps: int
    samples: int
    seconds: float
    losses: dict[str, float]
    scores: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, line: str) -> Trained:
        """From a line of the results."""
        values = json.loads(line)
        method = values.pop("method")
        return cls(
            method=Method(Which(method.pop("who")), **method), recipe=Recipe(**values.pop("recipe")), **values
        )

    @property
    def samples_per_second(self) -> float:
        """Speed of training."""
        return self.samples / self.seconds


def bench_compare(
    model: Annotated[str, typer.Argument(help="Whisper to start from.", metavar="MODEL")],
    clips: Annotated[
        Path,
        typer.Argument(
            help="Folder with SOURCE.csv (columns file, caption, split = train or validation).",
            metavar="CLIPS",
        ),
    ],
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the clips.")] = 3,
    max_steps: Annotated[int, typer.Option(min=0, help="Steps instead of epochs.")] = 0,
    seeds: Annotated[str, typer.Option(help="Seeds, as 0,1,2.")] = "0,1,2",
    window: WindowOption = Window.own,
    shares: Annotated[
        str, typer.Option(help="Shares of clips at full windows, as 0.1,0.2; a training for each.")
    ] = f"{SHARE:g}",
    ways: Annotated[
        list[str] | None,
        typer.Option(
            "--with", help="Settings of a run, as 'optim.lr=3e-5 batch.global_size=4'; a training for each."
        ),
    ] = None,
    captions: Annotated[bool, typer.Option(help="Score captions of the validation clips, too.")] = False,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 7e-5,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of Earwitness; the Trainer has one.")] = 1,
    only: Annotated[Which | None, typer.Option(help="Leave the other one out.")] = None,
    out: Annotated[
        Path | None, typer.Option(help=f"Folder of {RESULTS}: what is there already is not trained again.")
    ] = None,
    dir: DirOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Measure this trainer and transformers' Seq2SeqTrainer, in turn: samples/s, and validation loss."""
    methods = [
        method for method in _methods(window, shares, ranks, ways or [""]) if only in (None, method.who)
    ]
    where = Path(model)
    recipe = Recipe(
        str(where.resolve()) if where.is_dir() else model, str(clips.resolve()), epochs, max_steps, lr
    )
    with tempfile.TemporaryDirectory(prefix="bench-", dir=dir) as name:
        work = Path(name).resolve()
        results = Results((out or work) / RESULTS)
        due = [
            (method, seed)
            for seed in _numbers("--seeds", seeds, int)
            for method in methods
            if not results.have(method, seed, recipe, captions=captions)
        ]
        _check_installed([method for method, _ in due])
        bench = Comparison(work, recipe, captions=captions)
        for method in methods:
            bench.check(method)
        for method, seed in due:
            results.add(bench.train(method, seed))
        _report(results.of(recipe), as_json=as_json)


class Results:
    """Trainings that have been done, in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._trained: list[Trained] = []
        if path.exists():
            self._trained = [
                Trained.from_json(line) for line in path.read_text(encoding="utf-8").splitlines()
            ]

    def have(self, method: Method, seed: int, recipe: Recipe, *, captions: bool) -> bool:
        """Whether this training is among them, with scores of captions if they are asked for."""
        return any(
            (done.method, done.seed) == (method, seed) and (done.scores or not captions)
            for done in self.of(recipe)
        )

    def of(self, recipe: Recipe) -> list[Trained]:
        """Those of a recipe; of a training that was done again the last."""
        latest = {(done.method, done.seed): done for done in self._trained if done.recipe == recipe}
        return list(latest.values())

    def add(self, trained: Trained) -> None:
        """Keep one more."""
        self._trained.append(trained)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(trained)) + "\n")


class Comparison:
    """Trains in processes of their own, and judges the results."""

    def __init__(self, work: Path, recipe: Recipe, *, captions: bool) -> None:
        self._work, self._recipe, self._captions = work, recipe, captions
        self._validation = clips_of(Path(recipe.clips), "validation")

    def train(self, method: Method, seed: int) -> Trained:
        """Train, and judge the result."""
        say(f"seed {seed}: {method.name}")
        result = self._work / "result"
        train = self._train_theirs if method.who is Which.trainer else self._train_ours
        figures = train(method, seed, result)
        say(f"{figures['samples'] / figures['seconds']:.2f} samples/s; judging")
        losses = judge(result, self._validation)
        say(", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        scores = self._score(method, seed, result) if self._captions else {}
        shutil.rmtree(result)
        conditions = describe("torch", "transformers", "deepspeed") | {
            "device": device_name(),
            "dtype": dtype(),
        }
        return Trained(method, seed, self._recipe, conditions, losses=losses, scores=scores, **figures)

    def _score(self, method: Method, seed: int, result: Path) -> dict[str, float]:
        """Captions of all validation clips, padded to full windows, whatever it was trained on."""
        config = self._write_config(RunDir(self._work / "run"), method, seed, judged=True)
        output = run_module("tools.evaluate", result, config, "--window", "full", "--json", gpus=True)
        metrics = json.loads(output)["metrics"]
        scores = {
            name.removeprefix("validation/"): value
            for name, value in metrics.items()
            if not name.startswith("validation/loss")
        }
        say(", ".join(f"{name} {value:.4g}" for name, value in scores.items() if "/" not in name))
        return scores

    def _train_theirs(self, method: Method, seed: int, result: Path) -> dict[str, Any]:
        recipe = self._recipe
        task = Task(
            model=recipe.model,
            clips=recipe.clips,
            epochs=recipe.epochs,
            max_steps=recipe.max_steps or -1,
            lr=recipe.lr,
            batch=GLOBAL_BATCH,
            seed=seed,
            bf16=dtype() == "bf16",
            out=str(result),
        )
        output = run_module("tools.bench.seq2seq", task.as_json(), gpus=True)
        return dict(json.loads(output.splitlines()[-1]))

    def _train_ours(self, method: Method, seed: int, result: Path) -> dict[str, Any]:
        run = RunDir(self._work / "run")
        config = self._write_config(run, method, seed)
        run_module("launch", "train", config, "--procs", method.ranks, gpus=True)
        run_module("tools.export", run.path, result)
        figures = _read(run)
        shutil.rmtree(run.path)
        return figures

    def check(self, method: Method) -> None:
        """Raise ConfigError if the settings of a method are none of a run: before anything is trained."""
        if method.who is Which.trainer:
            return
        try:
            for name, where in DECIDED.items():
                if any(setting.startswith(name) for setting in method.settings):
                    raise ConfigError(f"{name} is for the comparison to say: {where}")
            self._config(RunDir(self._work / "run"), method, 0)
        except ConfigError as error:
            raise ConfigError(f"--with {method.overrides!r}: {error}") from None

    def _write_config(self, run: RunDir, method: Method, seed: int, *, judged: bool = False) -> Path:
        """A config for the clips, which are packed before they are first needed. judged: with those that
        results are judged by."""
        tables = tables_of(Path(self._recipe.clips))
        for name, table in tables.items():
            for split in ("train", "validation") if judged else ("train",):
                folder = self._shards(name, split)
                if not folder.exists():
                    run_module("tools.pack", table, folder, "--where", f"split={split}")
        path = self._work / "config.yaml"
        path.write_text(dump(self._config(run, method, seed, judged=judged)), encoding="utf-8")
        run_module("tools.index", path)
        return path

    def _config(self, run: RunDir, method: Method, seed: int, *, judged: bool = False) -> RunConfig:
        recipe = self._recipe
        length = {"max_steps": recipe.max_steps} if recipe.max_steps else {"epochs": recipe.epochs}
        sections = {
            "run": {"name": "compare", "dir": str(run.path), "seed": seed},
            "model": {"name_or_path": recipe.model},
            "data": {
                "sources": [self._source(name, judged=judged) for name in tables_of(Path(recipe.clips))],
                "index_dir": str(self._work / "index"),
                "window": method.window,
                "full_share": method.full_share,
                "audit": True,
            },
            "batch": {"global_size": GLOBAL_BATCH},
            "optim": {"lr": recipe.lr, "warmup_fraction": 0.0, **length},
            "engine": {"dtype": dtype()},
            "evaluate": {"every_steps": 10**6, "captions": 0, "scored": 0},
            "checkpoint": {"every_steps": 10**6, "keep_last": 1},
            "monitor": {"every_steps": 10**6},
        }
        plain = self._work / "plain.yaml"
        plain.write_text(yaml.safe_dump(sections), encoding="utf-8")
        return load(plain, method.settings)

    def _source(self, name: str, *, judged: bool) -> dict[str, Any]:
        source: dict[str, Any] = {"name": name, "shards": [f"{self._shards(name, 'train')}/*.tar"]}
        if judged:
            source["validation"] = {"shards": [f"{self._shards(name, 'validation')}/*.tar"]}
        return source

    def _shards(self, source: str, split: str) -> Path:
        return self._work / "shards" / f"{source}-{split}"


def _read(run: RunDir) -> dict[str, Any]:
    """What a run tells of its training: the curves are drawn once, at the end of the last step."""
    began = run.ledger.read().last(TrainingBegan)
    assert began
    last = read_curves(run)["speed/samples_per_second"][-1]
    samples = sum(len(line["keys"]) for line in run.audit.read().values)
    return {"steps": last.step, "samples": samples, "seconds": last.wall_time - began.time}


def _check_installed(methods: list[Method]) -> None:
    """Raise ConfigError if the Trainer is among them and cannot be imported."""
    if any(method.who is Which.trainer for method in methods) and not importlib.util.find_spec("accelerate"):
        raise ConfigError("transformers' Trainer needs accelerate: pip install accelerate (or --only ours)")


def _methods(window: Window, shares: str, ranks: int, ways: list[str]) -> list[Method]:
    """The ways to train that are compared, the Trainer's last."""
    of_clips = [1.0]
    if window is Window.own:
        of_clips = _numbers("--shares", shares, float)
    ours = [Method(Which.ours, window.value, share, ranks, way) for way in ways for share in of_clips]
    return [*ours, Method(Which.trainer, "full")]


def _numbers(option: str, text: str, kind: type[Number]) -> list[Number]:
    """Numbers that are separated by commas. Raises ConfigError."""
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: write numbers with commas, as in the help") from None


@dataclass(frozen=True)
class Spread:
    """Mean, and standard deviation over the seeds, of a figure."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """That of values."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + (f" ± {self.deviation:.2g}" if self.deviation else "")


def _report(trained: list[Trained], *, as_json: bool) -> None:
    """Print what each method has given, mean and spread over its seeds, and which aims are met."""
    by_method: dict[Method, list[Trained]] = {}
    for done in trained:
        by_method.setdefault(done.method, []).append(done)
    spreads = {method: _spreads(runs) for method, runs in by_method.items()}
    goals = _aims(spreads)
    if as_json:
        methods = {
            method.name: {
                **{name: dataclasses.asdict(spread) for name, spread in spreads[method].items()},
                "runs": [dataclasses.asdict(done) for done in runs],
            }
            for method, runs in by_method.items()
        }
        print(json.dumps({"methods": methods, "aims": verdicts(goals)}))
        return
    print(", ".join(f"{name} {grouped(value)}" for name, value in trained[-1].conditions.items()))
    columns = list(dict.fromkeys(name for figures in spreads.values() for name in figures))
    of_captions = [name for name in columns if name.partition("/")[0] in SCORES]
    of_training = [name for name in columns if name not in of_captions]
    for title, names in (("training", of_training), ("captions", of_captions)):
        if names:
            table = Table("", "seeds", *names, title=f"{title}, mean ± standard deviation over seeds")
            for method, figures in spreads.items():
                seeds = ",".join(str(done.seed) for done in by_method[method])
                table.add_row(method.name, seeds, *(str(figures.get(name, "")) for name in names))
            Console(width=160).print(table)
    for name, goal in goals.items():
        print(f"{name}: {goal}")


def _spreads(runs: list[Trained]) -> dict[str, Spread]:
    figures = {"samples/s": Spread.of([done.samples_per_second for done in runs])}
    values = [done.losses | done.scores for done in runs]
    by_source = [name.removeprefix("loss") for name in runs[0].losses]
    for name in (*runs[0].losses, *(f"{CIDER}{of}" for of in by_source), *SCORES[1:]):
        if all(name in of_run for of_run in values):
            figures[name] = Spread.of([of_run[name] for of_run in values])
    return figures


def _aims(spreads: dict[Method, dict[str, Spread]]) -> dict[str, Aim]:
    """Seconds per sample and loss, as shares of the Trainer's, if it is among the methods."""
    theirs = spreads.get(Method(Which.trainer, "full"))
    if theirs is None:
        return {}
    goals = {}
    for method, ours in spreads.items():
        if method.who is Which.ours:
            time = theirs["samples/s"].mean / ours["samples/s"].mean
            goals[f"{method.name}, seconds of the Trainer's"] = Aim(time, MOST_TIME[method.window])
            if method.window == "own":
                loss = ours["loss"].mean / theirs["loss"].mean
                goals[f"{method.name}, loss of the Trainer's"] = Aim(loss, MOST_LOSS)
            for name, score in ours.items():
                if name.partition("/")[0] == CIDER and name in theirs and score.mean:
                    # Theirs of ours: an aim is the most that a figure may be.
                    goals[f"{method.name}, the Trainer's {name} of ours"] = Aim(
                        theirs[name].mean / score.mean, 1.0
                    )
    return goals
