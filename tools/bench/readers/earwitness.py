"""Earwitness, with one decoding thread and the defaults of its settings; log-mel, as for the others, on the
CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import GenerationConfig, WhisperProcessor

from configs.cores import decoding_threads
from configs.load import validate
from configs.run.crash_journal import CrashJournal
from data import dataset
from data.batch import Batch, collate
from data.captions import CaptionEncoder, prefix_tokens
from data.features import log_mel
from data.loader import Loader
from data.samples import Samples
from tools.bench.readers import BATCH, MELS, SECONDS, SEED, Ready, Task


def read(task: Task) -> Iterator[Ready]:
    """Batches, with the features computed by this thread."""
    for batch in batches(task):
        features = log_mel(batch.waveforms, batch.lengths, batch.window, MELS)
        yield Ready(features, batch.labels, [key.rpartition("/")[2] for key in batch.keys])


def batches(task: Task) -> Iterator[Batch]:
    """As a run begins: merge the indexes, open them, and load."""
    data = {"sources": [{"name": "clips", "shards": task.shards}], "index_dir": task.index_dir, "threads": 1}
    sections = {
        "run": {"name": "bench", "seed": SEED},
        "model": {"name_or_path": task.model},
        "batch": {"global_size": BATCH},
        "optim": {"max_steps": 1},
    }
    config = validate(sections | {"data": data}, "bench")
    dataset.build(config, Path(task.work), SECONDS)
    found = dataset.open_dataset(config, Path(task.work))
    tokenizer = WhisperProcessor.from_pretrained(task.model).tokenizer
    encoder = CaptionEncoder(
        tokenizer,
        prefix_tokens(tokenizer, GenerationConfig.from_pretrained(task.model)),
        positions=64,
        long_caption="truncate",
    )
    samples = Samples(
        found.training,
        encoder,
        max_seconds=SECONDS,
        overlong=config.data.overlong,
        seed=SEED,
        in_hand=CrashJournal(decoding_threads(config.data)),
    )
    order = found.order(config, 100 * SECONDS)
    for step in Loader(
        samples,
        order,
        range(BATCH),
        range(1 << 40),
        threads=decoding_threads(config.data),
        read_ahead_mb=config.data.read_ahead_mb,
    ):
        yield collate(step.samples, order.window(step.number), tokenizer.pad_token_id)
