"""`python -m tools.export RUN|CHECKPOINT OUT`: a checkpoint -> a folder that `from_pretrained` loads. CPU only, tensor by tensor."""

from __future__ import annotations

import json
import os
import struct
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import safe_open
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import logging

from configs.errors import CheckpointError, run_command
from configs.rundir import RunDir
from tools.output import new_folder
from trainer import checkpoint
from trainer.model import UNTRAINED


class Dtype(StrEnum):
    """Precisions of an export."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def torch(self) -> torch.dtype:
        """As torch names it."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def export(
    source: Annotated[Path, typer.Argument(help="Folder of a run (its newest checkpoint) or of one checkpoint.", metavar="RUN|CHECKPOINT")],
    out: Annotated[Path, typer.Argument(help="Folder to make.", metavar="OUT")],
    dtype: Annotated[Dtype, typer.Option(help="Precision of the weights.")] = Dtype.fp32,
    best: Annotated[bool, typer.Option("--best", help="The checkpoint with the best evaluate.best_metric instead of the newest.")] = False,
) -> None:
    """Export a checkpoint to safetensors, with processor and generation config; it is loaded and compared before it is there."""
    logging.disable_progress_bar()
    run, folder = _resolve(source, best)
    reader = checkpoint.Reader(folder)
    with new_folder(out) as temporary:
        weights = _Weights(run, reader, dtype.torch)
        _write_weights(weights, temporary / "model.safetensors")
        _write_rest(run, reader, temporary, dtype)
        _compare(weights, temporary)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: step {reader.manifest.step} of {run.path}, {dtype.value}, {size / 1e6:.0f} MB, loaded and compared")


def _resolve(source: Path, best: bool) -> tuple[RunDir, Path]:
    """The run and the checkpoint that a path on the command line means."""
    if (source / "manifest.json").is_file():
        return RunDir(source.resolve().parents[1]), source
    run = RunDir(source)
    metric = run.read_config().evaluate.best_metric
    folder = checkpoint.best_of(run.checkpoints, metric)[1] if best else next(iter(checkpoint.find(run.checkpoints)), None)
    if folder is None:
        raise CheckpointError(f"{source}: has no {f'checkpoint with {metric}' if best else 'complete checkpoint'} yet")
    return run, folder


class _Weights:
    """The tensors of a model by name, one at a time: trained ones from the checkpoint, the others from the run's base."""

    def __init__(self, run: RunDir, reader: checkpoint.Reader, dtype: torch.dtype) -> None:
        self.reader, self.dtype = reader, dtype
        try:
            self._base = safe_open(run.base / UNTRAINED, "pt")
            config = WhisperConfig.from_pretrained(run.base)
        except (OSError, FileNotFoundError) as error:
            raise CheckpointError(f"{run.base}: the run's base is missing or incomplete ({error}); export needs it beside the checkpoints") from None
        with torch.device("meta"):
            model = WhisperForConditionalGeneration(config)
        self.shapes = {name: list(p.shape) for name, p in [*model.named_parameters(), *model.named_buffers()]}  # tied weights come once
        there = {*reader.manifest.parameters, *self._base.keys()}
        if missing := sorted(set(self.shapes) - there):
            raise CheckpointError(f"{reader.folder}: holds no {', '.join(missing[:3])}; is it of another model than {run.base}?")
        for name, about in reader.manifest.parameters.items():
            if about["shape"] != self.shapes.get(name):
                raise CheckpointError(f"{reader.folder}: {name} has the shape {about['shape']}, in {run.base} it is {self.shapes.get(name)}: of another model")

    def tensor(self, name: str) -> torch.Tensor:
        found = self.reader.tensor(name) if name in self.reader.manifest.parameters else self._base.get_tensor(name)
        return found.to(self.dtype).contiguous()


def _write_weights(weights: _Weights, path: Path) -> None:
    """Write a safetensors file with one tensor in memory at a time: length of the header, header, data (safetensors' own writer wants all)."""
    size = weights.dtype.itemsize
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in weights.shapes.items():
        end = at + torch.Size(shape).numel() * size
        header[name] = {"dtype": SAFETENSORS_NAMES[weights.dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in weights.shapes:
            file.write(weights.tensor(name).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _write_rest(run: RunDir, reader: checkpoint.Reader, folder: Path, dtype: Dtype) -> None:
    WhisperProcessor.from_pretrained(run.base).save_pretrained(folder)
    config = WhisperConfig.from_pretrained(run.base)
    config.dtype = dtype.torch
    config.architectures = ["WhisperForConditionalGeneration"]
    config.use_cache = True
    config.save_pretrained(folder)
    generation = GenerationConfig.from_pretrained(run.base)
    # Whisper bans quotes, colons and brackets, which captions are full of.
    learnt = set(reader.manifest.caption_tokens)
    generation.suppress_tokens = [token for token in generation.suppress_tokens or [] if token not in learnt] or None
    generation.save_pretrained(folder)


def _compare(weights: _Weights, folder: Path) -> None:
    """Load the export as its users will and compare every tensor. Raises CheckpointError."""
    loading: Any = WhisperForConditionalGeneration.from_pretrained(folder, dtype=weights.dtype, output_loading_info=True)
    model, info = loading
    WhisperProcessor.from_pretrained(folder)
    loaded = dict(model.named_parameters()) | dict(model.named_buffers())
    wrong = [name for name in weights.shapes if not torch.equal(loaded[name], weights.tensor(name))]
    problems = {"different": wrong, "missing": list(info["missing_keys"]), "unexpected": list(info["unexpected_keys"])}
    if any(problems.values()) or model.proj_out.weight.data_ptr() != model.model.decoder.embed_tokens.weight.data_ptr():
        raise CheckpointError(f"{folder}: what from_pretrained loads is not what the checkpoint holds: {problems}")


if __name__ == "__main__":
    run_command(lambda: typer.run(export))
