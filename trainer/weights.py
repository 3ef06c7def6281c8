"""The weights of a run's model at one of its checkpoints, whoever asks for them: an export, or the next
phase."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import WhisperConfig, WhisperForConditionalGeneration

from configs.errors import CheckpointError, ConfigError
from configs.run.folder import RunDir
from trainer import checkpoint
from trainer.checkpoint import Reader

UNTRAINED = "untrained.safetensors"


class Weights:
    """The tensors of a model by name, one at a time: trained ones from the checkpoint, the others from the
    run's base."""

    def __init__(self, run: RunDir, reader: Reader) -> None:
        """Raises CheckpointError if the two do not make up a model."""
        self.reader = reader
        try:
            self._base = safe_open(run.base / UNTRAINED, "pt")
            config = WhisperConfig.from_pretrained(run.base)
        except OSError as error:
            raise base_missing(run, error) from None
        with torch.device("meta"):
            model = WhisperForConditionalGeneration(config)
        self.shapes = {name: list(tensor.shape) for name, tensor in _tensors(model).items()}
        """By name; tied weights come once."""
        there = {*reader.manifest.parameters, *self._base.keys()}
        if missing := sorted(set(self.shapes) - there):
            raise CheckpointError(
                f"{reader.folder}: holds no {', '.join(missing[:3])}; is it of another model than {run.base}?"
            )
        for name, about in reader.manifest.parameters.items():
            if about["shape"] != self.shapes.get(name):
                raise CheckpointError(
                    f"{reader.folder}: {name} has the shape {about['shape']}, in {run.base} it is"
                    f" {self.shapes.get(name)}: of another model"
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor in its shape, float32."""
        found = (
            self.reader.tensor(name)
            if name in self.reader.manifest.parameters
            else self._base.get_tensor(name)
        )
        return found.float().contiguous()


def base_missing(run: RunDir, error: Exception) -> CheckpointError:
    """What to say if a run's base cannot be loaded."""
    return CheckpointError(
        f"{run.base}: the run's base is missing or incomplete ({error}); it is needed beside the checkpoints"
    )


def resolve(source: Path, *, best: bool = False) -> tuple[RunDir, Path]:
    """The run and the checkpoint that RUN|CHECKPOINT means: of a run the newest, or the `best` by its
    `evaluate.best_metric`."""
    if (source / checkpoint.MANIFEST).is_file():
        return RunDir(source.resolve().parents[1]), source
    run = RunDir(source)
    metric = run.read_config().evaluate.best_metric
    folder = (
        checkpoint.best_of(run.checkpoints, metric)[1]
        if best
        else next(iter(checkpoint.find(run.checkpoints)), None)
    )
    if folder is None:
        raise CheckpointError(
            f"{source}: has no {f'checkpoint with {metric}' if best else 'complete checkpoint'} yet"
        )
    return run, folder


@torch.no_grad()
def take_weights(model: WhisperForConditionalGeneration, source: Path) -> None:
    """Set all weights of a model to those of a run, a checkpoint or an export. Raises ConfigError if they
    cannot be read or do not fit."""
    targets = _tensors(model)
    try:
        if (source / "config.json").is_file():
            exported = _tensors(WhisperForConditionalGeneration.from_pretrained(source, dtype=torch.float32))
            weights: Weights | dict[str, torch.Tensor] = exported
            shapes = {name: list(tensor.shape) for name, tensor in exported.items()}
        else:
            run, folder = resolve(source)
            weights = Weights(run, Reader(folder))
            shapes = weights.shapes
        for name in (*targets, *(shapes.keys() - targets.keys())):
            here = list(targets[name].shape) if name in targets else None
            if here != shapes.get(name):
                raise ValueError(
                    f"it is of another model: {name} has the shape {shapes.get(name)} there, {here} here"
                )
        for name, target in targets.items():
            target.copy_(weights[name])
    except (OSError, ValueError, ConfigError, CheckpointError) as error:
        raise ConfigError(
            f"model.init_from: {source}: must be a run, a checkpoint or an export, of the model of"
            f" model.name_or_path: {error}"
        ) from error


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
