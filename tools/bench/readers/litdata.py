"""litdata, from chunks in its own format. It has no audio decoder: clips are decoded as for webdataset."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import litdata
from litdata.streaming import downloader
from webdataset import WebDataset

from tools.bench.readers import BATCH, SEED, Preparation, Ready, Task, decode


def convert(shards: Path, out: Path) -> None:
    """Write the samples of a folder of tars as chunks."""
    litdata.optimize(
        _samples,
        [str(shard) for shard in sorted(shards.iterdir())],
        str(out),
        chunk_bytes="16MB",
        num_workers=1,
        verbose=False,
    )


def _samples(shard: str) -> Iterator[dict[str, Any]]:
    for sample in WebDataset(shard, shardshuffle=False):
        audio = next(content for name, content in sample.items() if name[0] != "_" and name != "json")
        yield {"key": sample["__key__"], "audio": audio, "caption": json.loads(sample["json"])["caption"]}


def read(task: Task) -> Iterator[Ready]:
    """Batches from chunks. Those in a bucket are copied to a folder before they are read; this cache is so
    small that each epoch reads them anew."""
    prepare = Preparation(task.model)
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it has no setting for an endpoint without TLS
    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]} if "://" in task.chunks else {}
    samples = litdata.StreamingDataset(
        task.chunks,
        cache_dir=task.work,
        shuffle=True,
        seed=SEED,
        max_cache_size="16MB",
        storage_options=options,
    )
    endless = itertools.chain.from_iterable(itertools.repeat(samples))
    while batch := list(itertools.islice(endless, BATCH)):
        yield prepare(
            [decode(sample["audio"]) for sample in batch],
            [sample["caption"] for sample in batch],
            [sample["key"] for sample in batch],
        )
