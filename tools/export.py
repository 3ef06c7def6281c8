"""`python -m tools.export RUN|CHECKPOINT OUT`: a checkpoint -> a folder (or s3://...) that `from_pretrained`
loads; on the CPU, one tensor at a time."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import logging

from configs.errors import CheckpointError, run_command
from configs.run.folder import RunDir
from tools.output import new_folder
from trainer import checkpoint
from trainer.weights import Weights, resolve
from trainer.whisper import AUDIO_WINDOW


class Dtype(StrEnum):
    """Precisions of an export."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def torch(self) -> torch.dtype:
        """The same precision, as torch names it."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


def export(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run (its newest checkpoint) or of one checkpoint.", metavar="RUN|CHECKPOINT"
        ),
    ],
    out: Annotated[str, typer.Argument(help="Folder or s3://BUCKET/PREFIX to make.", metavar="OUT")],
    dtype: Annotated[Dtype, typer.Option(help="Precision of the weights.")] = Dtype.fp32,
    best: Annotated[
        bool,
        typer.Option(
            "--best", help="The checkpoint with the best evaluate.best_metric instead of the newest."
        ),
    ] = False,
) -> None:
    """Export a checkpoint to safetensors, with processor and generation config; OUT appears when the export
    has been loaded and compared."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # comparing tensors with more takes 4 times as long where cores are shared
    run, folder = resolve(source, best=best)
    reader = checkpoint.Reader(folder)
    with new_folder(out, last="config.json") as output:  # without that file from_pretrained refuses it
        weights = Weights(run, reader)
        _write_weights(weights, output.folder / "model.safetensors", dtype.torch)
        _write_rest(run, reader, output.folder, dtype)
        _compare(weights, output.folder, dtype.torch)
        size = sum(file.stat().st_size for file in output.folder.iterdir())
    origin = f"step {reader.manifest.step} of {run.path}"
    print(f"{out}: {origin}, {dtype.value}, {size / 1e6:.0f} MB, loaded and compared")


def _write_weights(weights: Weights, path: Path, dtype: torch.dtype) -> None:
    """Write a safetensors file (length of the header, header, data) with one tensor in memory at a time:
    safetensors' own writer wants all of them."""
    with path.open("wb") as file:
        file.write(checkpoint.safetensors_header(weights.shapes, dtype))
        for name in weights.shapes:
            file.write(weights[name].to(dtype).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _write_rest(run: RunDir, reader: checkpoint.Reader, folder: Path, dtype: Dtype) -> None:
    """Write processor, config and generation config."""
    WhisperProcessor.from_pretrained(run.base).save_pretrained(folder)
    config = WhisperConfig.from_pretrained(run.base)
    config.dtype = dtype.torch
    config.architectures = ["WhisperForConditionalGeneration"]
    config.use_cache = True
    setattr(config, AUDIO_WINDOW, run.read_config().data.window)
    config.save_pretrained(folder)
    generation = GenerationConfig.from_pretrained(run.base)
    # Whisper bans quotes, colons and brackets, which captions are full of.
    learnt = set(reader.manifest.caption_tokens)
    still_banned = [token for token in generation.suppress_tokens or [] if token not in learnt]
    generation.suppress_tokens = still_banned or None
    generation.save_pretrained(folder)


def _compare(weights: Weights, folder: Path, dtype: torch.dtype) -> None:
    """Load the export as its users will and compare every tensor. Raises CheckpointError."""
    loading: Any = WhisperForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    model, info = loading
    WhisperProcessor.from_pretrained(folder)
    loaded = dict(model.named_parameters()) | dict(model.named_buffers())
    different = [name for name in weights.shapes if not torch.equal(loaded[name], weights[name].to(dtype))]
    problems = {
        "different": different,
        "missing": list(info["missing_keys"]),
        "unexpected": list(info["unexpected_keys"]),
    }
    embedding, projection = model.model.decoder.embed_tokens.weight, model.proj_out.weight
    tied = projection.data_ptr() == embedding.data_ptr()
    if any(problems.values()) or not tied:
        raise CheckpointError(
            f"{folder}: what from_pretrained loads is not what the checkpoint holds: {problems}"
        )


if __name__ == "__main__":
    run_command(lambda: typer.run(export))
