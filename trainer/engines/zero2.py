"""DeepSpeed ZeRO-2 in BF16 with fp32 masters, accumulation and communication. The one file that touches
DeepSpeed's private attributes."""

# ruff: noqa: E402

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch


def _accelerator() -> str:
    """What the ranks compute on, which may be the CPU of a node that has GPUs."""
    if torch.distributed.is_initialized():
        return "cuda" if "nccl" in torch.distributed.get_backend_config() else "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


os.environ.setdefault("DS_ACCELERATOR", _accelerator())  # read when DeepSpeed is imported
import deepspeed
import deepspeed.ops
from deepspeed.utils import logger as deepspeed_logger

from configs.errors import ConfigError
from configs.schema import RunConfig
from trainer.distributed import World
from trainer.engines import KINDS, Fragment, Read, Update, global_norm
from trainer.optim import adamw
from trainer.whisper import Whisper

PRIVATE = (
    "single_partition_of_fp32_groups",
    "round_robin_bit16_groups",
    "partition_size",
    "param_names",
    "real_dp_process_group",
    "update_lp_params",
    "averaged_gradients",
    "all_grad_tensors",
    "check_overflow",
    "scaled_global_norm",
)
FP32_GRADIENTS = hasattr(torch.Tensor, "grad_dtype")
"""Whether the gradients of BF16 weights can be fp32: since torch 2.10."""


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's config. With its own defaults for the data types gradients are off by 1.4-2.3 %, with these
    by 0.01 %."""
    return {
        # DeepSpeed only counts with these: the loop says what a micro-batch is, and where a step ends.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": config.optim.clip_grad_norm,
        "steps_per_print": 10**9,
        "bf16": {"enabled": config.engine.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": 2, **config.engine.zero2.zero_optimization.model_dump()},
        "zero_allow_untested_optimizer": True,
        # Otherwise it waits for the GPU before every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }


@contextmanager
def _local_rank(device: torch.device) -> Iterator[None]:
    """Let LOCAL_RANK be the number of this rank's GPU meanwhile, as DeepSpeed takes the GPU of that number:
    where a site binds a GPU to each task, all of them have number 0."""
    before = os.environ["LOCAL_RANK"]
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = before


@contextmanager
def _compiler_left_out() -> Iterator[None]:
    """Let torch.compile do nothing meanwhile: to ask whether ZeRO knows an optimizer, DeepSpeed imports that
    of Muon, which compiles its kernels; the import of the compiler takes most of a second."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Elements [start, end) of a flattened parameter, which lie at `position` in a flat partition."""

    name: str
    start: int
    end: int
    partition: torch.Tensor
    position: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elements in a tensor that is laid out as the partition is."""
        return tensor[self.position : self.position + self.end - self.start]


class Zero2Engine:
    """Optimizer state and gradients divided among the ranks; every rank has the whole model in BF16."""

    def __init__(self, model: Whisper, config: RunConfig, world: World) -> None:
        deepspeed_logger.setLevel(logging.WARNING)
        # Would be compiled at the first use on a CPU: 27 s, and a crash without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._world_size = world.size
        # ZeRO makes its fp32 masters from weights that it has rounded to BF16: set them to the exact ones
        # afterwards.
        exact = {
            name: p.detach().to("cpu", copy=True).flatten()
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        with _local_rank(world.device), _compiler_left_out():
            self._engine, self._zero, *_ = deepspeed.initialize(
                model=model,
                optimizer=adamw(model, config.optim),
                config=deepspeed_config(config, world.size),
                dist_init_required=False,
            )
        missing = [name for name in PRIVATE if not hasattr(self._zero, name)]
        if missing:
            raise ConfigError(
                f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)} any more; install the range"
                " that requirements.txt names"
            )
        trained = [p for p in model.parameters() if p.requires_grad]
        self.dtype = trained[0].dtype
        if FP32_GRADIENTS:
            for parameter in trained:
                parameter.grad_dtype = torch.float32
        self._adds_up = FP32_GRADIENTS or self.dtype == torch.float32
        """Whether gradients may add up on each rank: in BF16 they would lose digits."""
        self._reduction: AbstractContextManager[None] | None = None
        """Reduces the gradients when it ends; None if there are none."""
        if not self._zero.cpu_offload:
            self._replace_checks()
        self.load(lambda name, kind, start, end: exact[name][start:end], None)
        self.publish()

    def __call__(self, **inputs: Any) -> torch.Tensor:
        """Forward pass of the model."""
        logits: torch.Tensor = self._engine(**inputs)
        return logits

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradient; `last` marks the last one of a step, which reduces the sum."""
        if self._reduction is None:
            self._reduction = self._engine.coalesce_grad_reduction()
            self._reduction.__enter__()
        self._engine.backward(loss * self._world_size)  # DeepSpeed averages over the ranks
        if last or not self._adds_up:
            self._reduction.__exit__(None, None, None)
            self._reduction = None

    def step(self, lr: float) -> Update:
        """Clip, update the weights and forget the gradient."""
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm() or 0.0)
        return Update(norm, bool(self._engine.was_step_applied()))

    def _replace_checks(self) -> None:
        """Let one norm say how long the gradient is and whether it is finite. DeepSpeed asks parameter by
        parameter, for each of both, and waits for the device three times."""
        self._zero.check_overflow = lambda partition_gradients: None
        self._zero.scaled_global_norm = self._norm

    def _norm(self) -> torch.Tensor:
        """Norm of the whole gradient, () float32 on the CPU."""
        groups = self._zero.averaged_gradients.values()
        return global_norm([gradient for group in groups for gradient in group]).to("cpu", torch.float32)

    def forget(self) -> None:
        """Forget the gradient, as DeepSpeed does where it is not finite."""
        self._zero.zero_grad()
        for group in self._zero.averaged_gradients:
            self._zero.averaged_gradients[group] = self._zero.all_grad_tensors[group] = None

    def fragments(self) -> list[Fragment]:
        """This rank's share of the state: views, not copies."""
        fragments = []
        for piece in self._pieces():
            state = self._zero.optimizer.state[piece.partition]
            tensors = {"master": piece.partition.detach(), **{kind: state[kind] for kind in KINDS[1:]}}
            views = {kind: piece.of(tensor) for kind, tensor in tensors.items()}
            fragments.append(Fragment(piece.name, piece.start, piece.end, views))
        return fragments

    def updates(self) -> int:
        """AdamW's own counter of updates."""
        return int(self._zero.optimizer.state[self._zero.single_partition_of_fp32_groups[0]]["step"])

    @torch.no_grad()
    def load(self, read: Read, updates: int | None) -> None:
        """Set this rank's share of the state. `updates` None: the weights, with a fresh optimizer."""
        for flat in self._zero.single_partition_of_fp32_groups:
            state = self._zero.optimizer.state[flat]
            state["step"] = torch.tensor(float(updates or 0), device=flat.device)
            for kind in KINDS[1:]:
                if updates is None or kind not in state:
                    state[kind] = torch.zeros_like(flat)
        kinds = KINDS if updates is not None else ("master",)
        for fragment in self.fragments():
            for kind in kinds:
                fragment.tensors[kind].copy_(read(fragment.name, kind, fragment.start, fragment.end))

    def publish(self) -> None:
        """Make the weights that compute from what every rank has loaded."""
        self._zero.update_lp_params()

    def evaluation_module(self) -> Whisper:
        """The model, for evaluation and generation."""
        module: Whisper = self._engine.module
        return module

    def _pieces(self) -> Iterator[_Piece]:
        """This rank's parts of parameters. The parameters of a group lie end to end, and are cut into
        partitions of equal size, one for each rank."""
        for group, parameters in enumerate(self._zero.round_robin_bit16_groups):
            size = self._zero.partition_size[group]
            rank = torch.distributed.get_rank(self._zero.real_dp_process_group[group])
            begin_of_partition, end_of_partition = rank * size, (rank + 1) * size
            begin_of_parameter = 0
            for parameter in parameters:
                end_of_parameter = begin_of_parameter + parameter.numel()
                begin = max(begin_of_parameter, begin_of_partition)
                end = min(end_of_parameter, end_of_partition)
                if begin < end:
                    yield _Piece(
                        name=self._zero.param_names[parameter],
                        start=begin - begin_of_parameter,
                        end=end - begin_of_parameter,
                        partition=self._zero.single_partition_of_fp32_groups[group],
                        position=begin - begin_of_partition,
                    )
                begin_of_parameter = end_of_parameter
