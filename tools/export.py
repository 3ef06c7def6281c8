"""`python -m tools.export RUN|CHECKPOINT OUT`: a checkpoint -> a folder (or s3://...) that transformers loads
and CTranslate2 converts, with a model card; on the CPU, written one tensor at a time."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers.utils import logging

from configs.errors import run_command
from tools.export_check import check_export
from tools.hub_files import run_generation, write_hub_files
from tools.model_card import write_model_card
from tools.output import new_folder
from trainer import checkpoint
from trainer.examine import examine_beside
from trainer.weights import Weights, resolve


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
    """Export a checkpoint for transformers, CTranslate2 and the model hub; OUT appears when transformers has
    loaded it, and captions with it as the run does."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # comparing tensors with more takes 4 times as long where cores are shared
    run, folder = resolve(source, best=best)
    reader = checkpoint.Reader(folder)
    with new_folder(out, last="config.json") as output:  # without that file from_pretrained refuses it
        weights = Weights(run, reader)
        base = examine_beside(run.base, "the run's base")
        for remark in base.remarks:
            print(remark, file=sys.stderr)
        _write_weights(weights, output.folder / "model.safetensors", dtype.torch)
        generation = run_generation(base, reader.manifest.caption_tokens)
        write_hub_files(base, output.folder, dtype.torch, generation, run.read_config().data.window)
        check_export(base, weights, generation, output.folder, dtype.torch)
        write_model_card(run, base, reader.manifest, Path(out).name, output.folder)
        size = sum(file.stat().st_size for file in output.folder.iterdir())
    origin = f"step {reader.manifest.step} of {run.path}"
    print(f"{out}: {origin}, {dtype.value}, {size / 1e6:.0f} MB, loaded, compared and asked for a caption")


def _write_weights(weights: Weights, path: Path, dtype: torch.dtype) -> None:
    """Write a safetensors file (length of the header, header, data) with one tensor in memory at a time:
    safetensors' own writer wants all of them."""
    with path.open("wb") as file:
        file.write(checkpoint.safetensors_header(weights.shapes, dtype))
        for name in weights.shapes:
            file.write(weights[name].to(dtype).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    run_command(lambda: typer.run(export))
