"""Earwitness, with one decoding thread and otherwise default settings; log-mel is computed on the CPU, as for
the others."""

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
from data.samples import SampleReader
from data.windows import Windows
from tools.bench.readers import BATCH, MELS, SECONDS, SEED, Ready, Task

FRAMES = 100 * SECONDS


def read(task: Task) -> Iterator[Ready]:
    """Batches with log-mel features, which this thread computes."""
    for batch in batches(task):
        features = log_mel(batch.waveforms, batch.sound, batch.audio, MELS, FRAMES)
        by_clip = features.unflatten(1, (-1, FRAMES)).transpose(0, 1)
        yield Ready(by_clip, batch.labels, [key.rpartition("/")[2] for key in batch.keys])


def batches(task: Task) -> Iterator[Batch]:
    """Batches as a run has them: indexes are merged and opened, then samples are read."""
    sources = [{"name": "clips", "shards": task.shards}]
    sections = {
        "run": {"name": "bench", "seed": SEED},
        "model": {"name_or_path": task.model},
        "data": {"sources": sources, "index_dir": task.index_dir, "threads": 1},
        "batch": {"global_size": BATCH},
        "optim": {"max_steps": 1},
    }
    config = validate(sections, "bench")
    dataset.build(config, Path(task.work), SECONDS)
    clips = dataset.open_dataset(config, Path(task.work))
    tokenizer = WhisperProcessor.from_pretrained(task.model).tokenizer
    encoder = CaptionEncoder(
        tokenizer.backend_tokenizer,
        prefix_tokens(tokenizer.backend_tokenizer, GenerationConfig.from_pretrained(task.model).to_dict()),
        positions=64,
        long_caption="truncate",
    )
    samples = SampleReader(
        clips.training,
        encoder,
        windows=Windows(FRAMES, share=1.0, seed=SEED),  # padded, as what the others make is
        max_seconds=SECONDS,
        overlong=config.data.overlong,
        seed=SEED,
        crash_journal=CrashJournal(decoding_threads(config.data)),
    )
    order = clips.order(config)
    loader = Loader(
        samples,
        order,
        range(BATCH),
        range(1 << 40),
        threads=decoding_threads(config.data),
        read_ahead_mb=config.data.read_ahead_mb,
    )
    for step in loader:
        yield collate(step.samples)
