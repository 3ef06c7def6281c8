"""Hugging Face datasets, streaming; its Audio feature decodes and resamples with torchcodec."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fsspec
from datasets import Audio, load_dataset
from s3fs import S3FileSystem

from data.decode import SAMPLE_RATE
from tools.bench.readers import BATCH, SEED, SHUFFLE, Preparation, Ready, Task


class _S3(S3FileSystem):
    """datasets 5.2 opens tars with block_size=0, which s3fs 2026.9 refuses."""

    def __init__(self, *arguments: Any, block_size: int = 0, **options: Any) -> None:
        super().__init__(*arguments, **options)


def read(task: Task) -> Iterator[Ready]:
    """Batches without `map`, which would cost more."""
    fsspec.register_implementation("s3", _S3, clobber=True)
    prepare = Preparation(task.model)
    samples = load_dataset(
        "webdataset", data_files={"train": task.shards}, split="train", streaming=True, cache_dir=task.work
    )
    samples = (
        samples.cast_column(task.ending, Audio(sampling_rate=SAMPLE_RATE))
        .shuffle(seed=SEED, buffer_size=SHUFFLE)
        .repeat(None)
    )
    for batch in samples.iter(batch_size=BATCH):
        yield prepare(
            [audio["array"] for audio in batch[task.ending]],
            [values["caption"] for values in batch["json"]],
            batch["__key__"],
        )
