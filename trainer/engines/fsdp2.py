"""PyTorch's FSDP2: fp32 masters and AdamW's state sharded by rows, whole weights in BF16 from the forward
pass to the last backward pass of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import WhisperForConditionalGeneration

from configs.schema import RunConfig
from trainer.distributed import World
from trainer.engines import KINDS, Fragment, Read, Update
from trainer.optim import adamw


class Fsdp2Engine:
    """Shards as ZeRO-2 does: gradients are reduced once per step, weights gathered once per step."""

    def __init__(self, model: WhisperForConditionalGeneration, config: RunConfig, world: World) -> None:
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.engine.dtype]
        self._world, self._clip = world, config.optim.clip_grad_norm
        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
        self._model: Any = model
        for module in (*self._model.model.encoder.layers, *self._model.model.decoder.layers, self._model):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
            module.set_gradient_divide_factor(1.0)  # the sum over ranks, not the mean
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
        trained: Any = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._trained: dict[str, DTensor] = trained
        self._optimizer = adamw(model, config.optim)
        self._reset_optimizer(0)

    def __call__(self, **inputs: Any) -> Any:
        """Forward pass of the model."""
        return self._model(**inputs)

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
        norm = math.sqrt(
            self._world.sum(
                [sum(float(gradient.square().sum(dtype=torch.float64)) for gradient in gradients)]
            )[0]
        )
        applied = math.isfinite(norm)
        if applied:
            torch._foreach_mul_(gradients, min(1.0, self._clip / (norm + 1e-6)))
            self._optimizer.step()
        self._optimizer.zero_grad()
        return Update(norm, applied)

    def fragments(self) -> list[Fragment]:
        """This rank's share of the state: views, not copies. The same stretches every time."""
        found = []
        for name, parameter, start, end in self._pieces():
            state = self._optimizer.state[parameter]
            tensors = {"master": parameter, **{kind: state[kind] for kind in KINDS[1:]}}
            found.append(
                Fragment(name, start, end, {kind: _flat(tensor) for kind, tensor in tensors.items()})
            )
        return found

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
    def evaluation_module(self) -> torch.nn.Module:
        """A copy of the whole model in `dtype`: generation bypasses the hooks that gather weights, and ranks
        stop at different lengths."""
        with torch.device("meta"):
            whole: Any = WhisperForConditionalGeneration(self._model.config)
        whole.to(self.dtype).to_empty(device=self._world.device)
        whole.tie_weights()
        whole.generation_config = self._model.generation_config
        targets = dict(whole.named_parameters()) | dict(whole.named_buffers())
        for name, tensor in (*self._model.named_parameters(), *self._model.named_buffers()):
            targets[name].copy_(self._gathered(tensor) if isinstance(tensor, DTensor) else tensor)
        return whole

    def _gathered(self, parameter: DTensor) -> torch.Tensor:
        """All rows of a parameter, by one plain collective: a rank has crashed in DTensor.full_tensor (torch
        2.13, gloo)."""
        share = -(-parameter.shape[0] // self._world.size) * (parameter.numel() // parameter.shape[0])
        local = _flat(parameter)
        mine = local.new_zeros(share)
        mine[: local.numel()] = local
        gathered = mine.new_empty(self._world.size, share)
        dist.all_gather(list(gathered.unbind()), mine)
        return gathered.view(-1)[: parameter.numel()].view(parameter.shape)

    def _reset_optimizer(self, updates: int) -> None:
        for parameter in self._trained.values():
            state: dict[str, torch.Tensor] = self._optimizer.state[parameter]
            state["step"] = torch.tensor(float(updates), device=self._world.device)
            for kind in KINDS[1:]:
                state[kind] = torch.zeros_like(parameter)

    def _pieces(self) -> Iterator[tuple[str, DTensor, int, int]]:
        """This rank's rows of parameters: (name, parameter, first element, end)."""
        for name, parameter in self._trained.items():
            rows = parameter.shape[0]
            share = -(-rows // self._world.size)
            first, end = (min(rows, rank * share) for rank in (self._world.rank, self._world.rank + 1))
            width = parameter.numel() // rows
            assert parameter.to_local().shape[0] == end - first, name
            if first < end:
                yield name, parameter, first * width, end * width


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, (n,)."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(-1)
