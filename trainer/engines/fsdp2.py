"""PyTorch's FSDP2: fp32 masters and AdamW's state sharded by rows, whole weights in BF16 from the forward
pass to the last backward pass of a step."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from configs.schema import RunConfig
from trainer.distributed import World
from trainer.engines import KINDS, Fragment, Read, Update, global_norm
from trainer.optim import adamw
from trainer.transfer import OnItsWay
from trainer.whisper import Whisper


class Fsdp2Engine:
    """Shards as ZeRO-2 does: gradients are reduced once per step, weights gathered once per step."""

    def __init__(self, model: Whisper, config: RunConfig, world: World) -> None:
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.engine.dtype]
        self._world, self._clip = world, config.optim.clip_grad_norm
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
        self._model: Any = model
        sharded: list[Any] = [*model.blocks, model]
        for module in sharded:
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
            module.set_gradient_divide_factor(1.0)  # the sum over ranks, not the mean
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
        trained: Any = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._trained: dict[str, DTensor] = trained
        self._optimizer: Any = adamw(model, config.optim)
        self._reset_optimizer(0)

    def __call__(self, **inputs: Any) -> torch.Tensor:
        """Forward pass of the model."""
        logits: torch.Tensor = self._model(**inputs)
        return logits

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradient; `last` marks the last one of a step."""
        self._model.set_requires_gradient_sync(last)
        self._model.set_reshard_after_backward(last)
        loss.backward()

    def step(self, lr: float) -> Update:
        """Clip, update the weights and forget the gradient."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        gradients = [_flat(p.grad) for p in self._trained.values() if p.grad is not None]
        norm = global_norm(gradients)
        on_its_way = OnItsWay(norm)
        torch._foreach_mul_(gradients, (self._clip / (norm + 1e-6)).clamp(max=1.0).float())
        self._optimizer.found_inf = (~norm.isfinite()).float()  # leaves all as it is if this is 1
        self._optimizer.step()
        self._optimizer.zero_grad()
        length = on_its_way.read()
        return Update(length, math.isfinite(length))

    def forget(self) -> None:
        """Forget the gradient."""
        self._optimizer.zero_grad()

    def fragments(self) -> list[Fragment]:
        """This rank's share of the state: views, not copies. The same stretches every time."""
        fragments = []
        for name, parameter in self._trained.items():
            start, end = self._stretch(parameter)
            if start < end:
                state = self._optimizer.state[parameter]
                tensors = {"master": parameter, **{kind: state[kind] for kind in KINDS[1:]}}
                flat = {kind: _flat(tensor) for kind, tensor in tensors.items()}
                fragments.append(Fragment(name, start, end, flat))
        return fragments

    def updates(self) -> int:
        """AdamW's own counter of updates."""
        return int(self._optimizer.state[next(iter(self._trained.values()))]["step"])

    @torch.no_grad()
    def load(self, read: Read, updates: int | None) -> None:
        """Set this rank's share of the state. `updates` None: the weights, with a fresh optimizer."""
        self._reset_optimizer(updates or 0)
        for fragment in self.fragments():
            for kind in KINDS if updates is not None else KINDS[:1]:
                fragment.tensors[kind].copy_(read(fragment.name, kind, fragment.start, fragment.end))

    def publish(self) -> None:
        """Nothing is to be done: weights are gathered from the shards at every step."""

    @torch.no_grad()
    def evaluation_module(self) -> Whisper:
        """A copy of the whole model in `dtype`: generation bypasses the hooks that gather weights, and ranks
        stop at different lengths."""
        with torch.device("meta"):
            whole = Whisper(self._model.config)
        whole.to(self.dtype).to_empty(device=self._world.device)
        whole.tie_weights()
        targets = dict(whole.named_parameters()) | dict(whole.named_buffers())
        for name, tensor in (*self._model.named_parameters(), *self._model.named_buffers()):
            targets[name].copy_(self._gathered(tensor) if isinstance(tensor, DTensor) else tensor)
        return whole

    def _gathered(self, parameter: DTensor) -> torch.Tensor:
        """All rows of a parameter, by one plain collective: a rank has crashed in DTensor.full_tensor (torch
        2.13, gloo)."""
        local = _flat(parameter)
        padded = local.new_zeros(self._rows_per_rank(parameter) * _elements_per_row(parameter))
        padded[: local.numel()] = local
        gathered = padded.new_empty(self._world.size, padded.numel())
        dist.all_gather(list(gathered.unbind()), padded)
        return gathered.view(-1)[: parameter.numel()].view(parameter.shape)

    def _reset_optimizer(self, updates: int) -> None:
        for parameter in self._trained.values():
            state: dict[str, torch.Tensor] = self._optimizer.state[parameter]
            state["step"] = torch.tensor(float(updates), device=self._world.device)
            for kind in KINDS[1:]:
                state[kind] = torch.zeros_like(parameter)

    def _stretch(self, parameter: DTensor) -> tuple[int, int]:
        """The elements [start, end) of a flattened parameter that this rank holds: whole rows, none on the
        last ranks where there are too few."""
        rows = parameter.shape[0]
        first = min(rows, self._world.rank * self._rows_per_rank(parameter))
        end = min(rows, first + self._rows_per_rank(parameter))
        assert parameter.to_local().shape[0] == end - first
        return first * _elements_per_row(parameter), end * _elements_per_row(parameter)

    def _rows_per_rank(self, parameter: DTensor) -> int:
        return math.ceil(parameter.shape[0] / self._world.size)


def _elements_per_row(parameter: DTensor) -> int:
    return parameter.numel() // parameter.shape[0]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, (n,)."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(-1)
