"""Captions of validation clips are the same on any number of ranks, and what is wrong with a model shows in
its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.load import validate
from configs.run.events import Evaluated, Progress
from configs.run.folder import RunDir
from configs.run.ledger import History
from configs.run.predictions import read_predictions, steps_of
from data.batch import Batch
from data.captions import IGNORED
from tests.evaluators import open_setup
from tests.forks import Launcher
from tests.making import config_values
from trainer import listening
from trainer.allowance import Allowance
from trainer.evaluate import Setup
from trainer.listening import GROUP, Listener, Listening

pytestmark = pytest.mark.usefixtures("one_thread")

Listen = Callable[..., Listening]


@pytest.fixture
def listen(model: Path, tmp_path: Path, shards: str) -> Listen:
    """What a model that knows nothing says, on 1 or more ranks one after the other."""

    def listen(ranks: int = 1, count: int = 1000, **settings: Any) -> Listening:
        told: list[Any] = []
        for rank in reversed(range(ranks)):
            setup = open_setup(model, tmp_path, shards, rank, ranks, **settings)
            setup.world.others = told  # type: ignore[attr-defined]
            listener = Listener(setup)
            heard = listener.listen(setup.captioner.model, next, count)
            told = [setup.world.told, *told]  # type: ignore[attr-defined]
        assert heard is not None
        return heard

    return listen


def test_captions_losses_and_metrics_are_the_same_on_any_number_of_ranks(listen: Listen) -> None:
    settings = {"evaluate": {"captions": 3, "scored": 10}, "window": "own", "max_seconds": None}
    alone = listen(**settings)
    assert len(alone.predictions) == 10 and len(alone.panel) == 3
    assert len({clip.caption for clip in alone.predictions}) > 1
    for ranks in (2, 3):
        together = listen(ranks, **settings)
        assert (together.metrics, together.predictions) == (alone.metrics, alone.predictions)
        assert [clip.caption for clip in together.panel] == [clip.caption for clip in alone.panel]


def test_fewer_clips_are_the_first_of_all_and_the_panel_is_among_them(listen: Listen) -> None:
    evaluate = {"captions": 4, "scored": 20}
    some, whole = (listen(count=count, evaluate=evaluate) for count in (9, 1000))
    assert [clip.key for clip in some.predictions] == [clip.key for clip in whole.predictions][:9]
    assert [clip.sample.key for clip in some.panel] == [clip.key for clip in whole.predictions][:4]
    assert len({clip.key for clip in whole.predictions}) == 20


def test_the_panel_alone_has_no_scores_to_compare(listen: Listen) -> None:
    heard = listen(evaluate={"captions": 4, "scored": 0})
    assert not heard.metrics and len(heard.panel) == 4


def test_a_panel_of_all_clips_that_there_are_is_scored(listen: Listen) -> None:
    heard = listen(evaluate={"captions": 12, "scored": 4})
    assert len(heard.panel) == 12 and "validation/cider_d" in heard.metrics


class Planted:
    """A model with a fault, in the place of one that captions."""

    beyond = ()

    def __init__(self, setup: Setup, captions: Callable[[int], str]) -> None:
        self.tokenizer, self.captions, self.said = setup.captioner.tokenizer, captions, 0

    def __call__(self, clips: Sequence[object]) -> list[torch.Tensor]:
        texts = [self.captions(self.said + number) for number in range(len(clips))]
        self.said += len(clips)
        return [torch.tensor(self.tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]


@pytest.mark.parametrize(
    ("captions", "metric", "low", "high"),
    [
        (lambda number: "beep beep " * 20, "repetition_rate", 0.9, 1.0),
        (lambda number: "beep beep " * 20, "silence_repetition_rate", 0.9, 1.0),
        (lambda number: "A low beep, 2 times.", "distinct_2", 0.0, 0.1),
        (lambda number: "", "empty_rate", 1.0, 1.0),
        (lambda number: "A low beep, 2 times. " * 3, "length_ratio", 2.0, 4.0),
        (lambda number: "A low beep, 2 times. " * 3, "noise_words", 15, 15),
        (lambda number: "A low beep, 2 times.", "repetition_rate", 0.0, 0.0),
    ],
    ids=["loops", "loops in silence", "says the same", "says nothing", "talks", "hears things", "sane"],
)
def test_a_fault_stands_out_in_the_figure_that_is_made_for_it(
    listen: Listen,
    monkeypatch: pytest.MonkeyPatch,
    captions: Callable[[int], str],
    metric: str,
    low: float,
    high: float,
) -> None:
    monkeypatch.setattr(Setup, "generator", lambda setup, module: Planted(setup, captions))
    assert low <= listen(evaluate={"captions": 0, "scored": 16}).metrics[f"validation/{metric}"] <= high


@pytest.mark.parametrize(("hears", "least", "most"), [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0)])
def test_discrimination_is_the_share_of_clips_whose_own_caption_is_likelier_than_anothers(
    listen: Listen, monkeypatch: pytest.MonkeyPatch, hears: float, least: float, most: float
) -> None:
    """A model that hears finds the caption of the clip likelier; one that does not, finds both as likely."""
    mine: dict[int, tuple[int, ...]] = {}

    def losses(module: object, batch: Batch, config: object, dtype: torch.dtype) -> torch.Tensor:
        out = []
        captions = batch.labels.split(batch.text.lengths)
        for waveform, caption in zip(batch.waveforms.split(batch.sound.lengths), captions, strict=True):
            own = mine.setdefault(int(waveform.long().abs().sum()), tuple(caption.tolist()))
            out.append((1 + hears * (own != tuple(caption.tolist()))) * (caption != IGNORED))
        return torch.cat(out)

    monkeypatch.setattr(listening, "token_losses", losses)
    metrics = listen(evaluate={"captions": 0, "scored": 16}).metrics
    assert least <= metrics["validation/discrimination"] <= most


def past(*, captioned: int = 10, seconds: float = 5.0, speed: float | None = 16.0) -> History:
    return History(
        [
            Evaluated(
                attempt=0, step=0, metrics={}, captions=[], captioned=captioned, captioning_seconds=seconds
            ),
            Progress(attempt=0, step=9, samples_per_second=speed, seconds={}),
        ]
    )


@pytest.mark.parametrize(
    ("history", "speed", "expected"),
    [
        (History([]), None, 6),
        (past(), None, 50),  # 100 steps of 8 at 16/s are 50 s; half of that, at 0.5 s a clip
        (past(), 8.0, 100),
        (past(seconds=0.1), None, 200),
        (past(seconds=5000), None, 6 + 2 * GROUP),
        (past(speed=None), None, 6),
    ],
    ids=["begin", "share", "this attempt's speed", "all", "slow", "no step taken"],
)
def test_captions_take_no_more_than_their_share_of_the_time_or_a_group_of_each_rank(
    tmp_path: Path, history: History, speed: float | None, expected: int
) -> None:
    values = config_values("run", tmp_path, tmp_path, "x.tar", evaluate={"share": 0.5, "every_steps": 100})
    allowance = Allowance(validate(values, "test"), history, ranks=2)
    assert allowance.clips(speed, all_clips=200, panel=6) == expected


def test_where_captions_mark_the_best_checkpoint_all_are_made_at_each_evaluation(tmp_path: Path) -> None:
    values = config_values("run", tmp_path, tmp_path, "x.tar")
    values["evaluate"]["best_metric"] = "validation/cider_d"
    allowance = Allowance(validate(values, "test"), past(seconds=5000), ranks=2)
    assert allowance.clips(None, all_clips=200, panel=6) == 200


def test_a_run_keeps_what_was_said_and_its_figures_do_not_depend_on_its_ranks(
    tmp_path: Path, model: Path, shards: str, launch: Launcher
) -> None:
    evaluate = {"every_steps": 6, "captions": 2, "scored": 4, "share": float("inf")}
    metrics = []
    for procs in (1, 2):
        sections = {"optim": {"max_steps": 12}, "engine": {"dtype": "fp32"}, "evaluate": evaluate}
        config = config_values(f"run{procs}", tmp_path, model, shards, **sections)
        done = launch(config, procs=procs)
        assert done.returncode == 0, done.stderr
        run = RunDir(tmp_path / f"run{procs}")
        evaluations = run.ledger.read().of(Evaluated)
        assert [event.captioned for event in evaluations] == [4, 4, 4]
        metrics.append(evaluations[0].metrics)
        said = steps_of(run.evaluations)
        assert list(said) == [0, 6, 12]
        clips = read_predictions(said[12])
        assert len(clips) == 4 and all("rouge_l" in clip.scores and clip.references for clip in clips)
    assert {"validation/loss", "validation/cider_d", "validation/discrimination/sounds"} <= metrics[0].keys()
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)
