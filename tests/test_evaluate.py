"""Validation takes the same samples on any number of ranks, and reads them as training reads its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import location
from data.batch import Batch
from data.loader import Loader, Step
from tests.evaluators import open_setup
from tools.sandbox import faults, s3
from tools.sandbox.faults import Proxy
from trainer import evaluate
from trainer.evaluate import Evaluator, LeftOff

Open = Callable[..., Evaluator]


@pytest.fixture
def opened(model: Path, tmp_path: Path) -> Open:
    """Evaluators of some shards; keyword arguments as those of `open_setup`."""

    def opened(shards: str, *rank: int, **settings: Any) -> Evaluator:
        return Evaluator(open_setup(model, tmp_path, shards, *rank, **settings), lambda: None)

    return opened


@pytest.fixture(autouse=True)
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """What has been evaluated; the loss of a sample is a number that depends on its sound and its labels."""
    seen: list[Batch] = []

    def losses(module: object, batch: Batch, config: object, dtype: torch.dtype) -> torch.Tensor:
        seen.append(batch)
        sound = torch.stack(
            [clip.double().abs().sum() for clip in batch.waveforms.split(batch.sound.lengths)]
        )
        return sound[batch.text.owners] / 1e6 + batch.labels.double().clamp(min=0)

    monkeypatch.setattr(evaluate, "token_losses", losses)
    return seen


def evaluated(evaluator: Evaluator) -> list[float]:
    """The sums of one rank: losses and tokens."""
    evaluator.loss(torch.nn.Identity(), next)
    return evaluator.setup.world.summed


@pytest.mark.parametrize("micro", [1, 4])
def test_the_loss_and_the_samples_are_the_same_on_any_number_of_ranks(
    shards: str, opened: Open, batches: list[Batch], micro: int
) -> None:
    """Rank after rank takes the next micro-batch, round by round; overlong clips are cropped alike."""
    alone = evaluated(opened(shards, micro=micro))
    expected = [key for batch in batches for key in batch.keys]
    assert len(expected) == len(set(expected)) > 40
    for ranks in (2, 3):
        sums, rounds = np.zeros(2), []
        for rank in range(ranks):
            batches.clear()
            sums += evaluated(opened(shards, rank, ranks, micro=micro))
            rounds.append([batch.keys for batch in batches])
        assert [key for keys in zip(*rounds, strict=True) for of_rank in keys for key in of_rank] == expected
        assert sums.tolist() == pytest.approx(alone, rel=1e-12)


@pytest.fixture
def bucket(shards: str, s3_server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Proxy]]:
    """The shards on S3, and the proxy before it."""
    client = s3_server.client()
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket="validation")
    for shard in Path(shards).parent.glob("*.tar"):
        client.upload_file(str(shard), "validation", shard.name)
    monkeypatch.setattr(location, "_open", {})
    with faults.serve(s3_server.endpoint) as proxy:
        for name, value in {**s3_server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            monkeypatch.setenv(name, value)
        yield "s3://validation/*.tar", proxy


def test_neighbours_come_in_one_request_and_from_the_cache_the_next_time(
    bucket: tuple[str, Proxy], opened: Open, batches: list[Batch], tmp_path: Path
) -> None:
    url, proxy = bucket
    evaluator = opened(url, cache_dir=str(tmp_path / "cache"))
    asked = []
    for _ in range(2):
        proxy.set()
        batches.clear()
        evaluated(evaluator)
        assert sum(len(batch.keys) for batch in batches) > 40
        asked.append(len(proxy.requests))
    assert 0 < asked[0] <= 40 / 4, "far fewer than two for each sample"
    assert asked[1] == 0
    plain = opened(url)
    proxy.set()
    evaluated(plain)
    assert 0 < len(proxy.requests) <= 40 / 4, "without a cache, too"


def test_an_error_ends_it_where_all_ranks_learn_of_it(shards: str, opened: Open) -> None:
    """A shard that is gone: the error comes out of the call that agrees with the other ranks."""
    evaluator = opened(shards)
    errors: list[Exception] = []

    def read(*place: object) -> bytes:
        raise OSError("gone")

    def take(loader: Loader) -> Step:
        try:
            return next(loader)
        except OSError as error:
            errors.append(error)
            raise LeftOff from error

    evaluator.setup.loaders.__dict__["_read"] = read
    with pytest.raises(LeftOff):
        evaluator.loss(torch.nn.Identity(), take)
    assert [str(error) for error in errors] == ["gone"]
