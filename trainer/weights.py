"""The weights of a run's model at one of its checkpoints, whoever asks for them: an export, or the next
phase."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from configs.errors import CheckpointError, ConfigError
from configs.run.folder import RunDir
from trainer import checkpoint
from trainer.checkpoint import Reader
from trainer.examine import examine_weights, read_config
from trainer.weight_files import Tensors
from trainer.whisper import Whisper

if TYPE_CHECKING:
    from transformers import WhisperConfig

UNTRAINED = "untrained.safetensors"


class Weights:
    """The tensors of a model by name, one at a time: trained ones from the checkpoint, the others from the
    run's base."""

    def __init__(self, run: RunDir, reader: Reader) -> None:
        """Raises CheckpointError if the two do not make up a model."""
        self.reader = reader
        try:
            self._base = safe_open(run.base / UNTRAINED, "pt")
            config = read_config(run.base)
        except (OSError, SafetensorError, ConfigError) as error:
            raise base_missing(run, error) from None
        with torch.device("meta"):
            model = Whisper(config)
        self.shapes = _shapes(_tensors(model))
        """By name; tied weights come once."""
        missing = sorted(set(self.shapes) - {*reader.manifest.parameters, *self._base.keys()})
        if missing:
            raise CheckpointError(
                f"{reader.folder}: holds no {', '.join(missing[:3])}; is it of another model than {run.base}?"
            )
        for name, parameter in reader.manifest.parameters.items():
            if parameter["shape"] != self.shapes.get(name):
                raise CheckpointError(
                    f"{reader.folder}: {name} has the shape {parameter['shape']}, in {run.base} it is"
                    f" {self.shapes.get(name)}: of another model"
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor in its shape, float32."""
        if name in self.reader.manifest.parameters:
            return self.reader.tensor(name)
        tensor: torch.Tensor = self._base.get_tensor(name)
        return tensor.float().contiguous()


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
    if best:
        folder = checkpoint.best_of(run.checkpoints, metric)
        wanted = f"checkpoint with {metric}"
    else:
        folder = next(iter(checkpoint.find(run.checkpoints)), None)
        wanted = "complete checkpoint"
    if folder is None:
        raise CheckpointError(f"{source}: has no {wanted} yet")
    return run, folder


def is_model(source: Path) -> bool:
    """Whether this is an export or another model's folder, not a run or a checkpoint."""
    return any((source / file).is_file() for file in ("config.json", "adapter_config.json"))


@torch.no_grad()
def take_weights(model: Whisper, source: Path) -> None:
    """Set all weights of a model to those of a run, a checkpoint or an export. Raises ConfigError if they
    cannot be read or do not fit."""
    with _told(source):
        weights = _stored(source, model)
        for name, target in _tensors(model).items():
            target.copy_(weights[name])


def examine_source(source: Path, config: WhisperConfig) -> None:
    """Look over what `take_weights` will take for a model of this config. Raises ConfigError."""
    with torch.device("meta"):
        model = Whisper(config)
    with _told(source):
        _stored(source, model)


@contextlib.contextmanager
def _told(source: Path) -> Iterator[None]:
    """Let errors say what was asked for."""
    try:
        yield
    except (OSError, ValueError, ConfigError, CheckpointError) as error:
        raise ConfigError(
            f"model.init_from: {source}: must be a run, a checkpoint or an export, of the model of"
            f" model.name_or_path: {error}"
        ) from error


def _stored(source: Path, model: Whisper) -> Weights | Tensors:
    """The weights of a run, a checkpoint or an export. Raises ValueError if they are of another model."""
    weights: Weights | Tensors
    if is_model(source):
        weights = examine_weights(source)
    else:
        run, folder = resolve(source)
        weights = Weights(run, Reader(folder))
    _check_shapes(weights.shapes, _shapes(_tensors(model)))
    return weights


def _check_shapes(theirs: dict[str, list[int]], ours: dict[str, list[int]]) -> None:
    """Raise ValueError if weights are of another model, by the shapes of its tensors."""
    for name in (*ours, *(theirs.keys() - ours.keys())):
        there, here = theirs.get(name), ours.get(name)
        if there != here:
            raise ValueError(f"it is of another model: {name} has the shape {there} there, {here} here")


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}
