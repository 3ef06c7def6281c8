"""What both engines do with a gradient: exact sums, one reduction per step, nothing if it is not finite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from configs.load import validate
from configs.ports import free_ports
from configs.schema import RunConfig, ZeroOptimization
from data.batch import Batch, Sample, collate
from data.captions import Tokens
from tests.making import config_values
from trainer import distributed, model
from trainer.distributed import World
from trainer.engines import Engine, fsdp2, global_norm, zero2
from trainer.loss import token_losses
from trainer.model import Captioner

MICRO_BATCHES = 6
BACKENDS = {"zero2": zero2.Zero2Engine, "fsdp2": fsdp2.Fsdp2Engine}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A job of one rank in this process."""
    place = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.items():
            patch.setenv(name, value)
        patch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
        yield distributed.start(["here"], torch.device("cpu"))
        distributed.end()


class Case:
    """An engine and micro-batches for it."""

    def __init__(
        self,
        backend: str,
        dtype: str,
        folder: Path,
        weights: Path,
        world: World,
        micro_batches: int,
        zero: dict[str, object] | None = None,
    ) -> None:
        values = config_values(
            "run",
            folder,
            weights,
            "x.tar",
            engine={"backend": backend, "dtype": dtype, "zero2": {"zero_optimization": zero or {}}},
            optim={"clip_grad_norm": 1e9, "weight_decay": 0.1},
        )
        self.config: RunConfig = validate(values, "test")
        self.whisper = self.captioner().config
        self.engine: Engine = BACKENDS[backend](self.captioner().model, self.config, world)
        self.batches = [batch(number) for number in range(micro_batches)]

    def captioner(self) -> Captioner:
        return model.load(self.config.model, seed=1)

    def backward(self, factor: float = 1.0) -> None:
        for one in self.batches:
            losses = token_losses(self.engine, one, self.whisper, self.engine.dtype)
            self.engine.backward(losses.sum() * factor, last=one is self.batches[-1])

    def gradients(self) -> list[dict[str, torch.Tensor]]:
        """Of each micro-batch by itself, in plain PyTorch."""
        captioner = self.captioner()
        captioner.model.to(self.engine.dtype)
        gradients = []
        for one in self.batches:
            captioner.model.zero_grad()
            token_losses(captioner.model, one, self.whisper, self.engine.dtype).sum().backward()
            gradients.append({name: p.grad.float().flatten() for name, p in captioner.trained.items()})
        return gradients

    def state(self) -> dict[str, torch.Tensor]:
        return {
            f"{fragment.name}:{kind}:{fragment.start}": tensor.clone()
            for fragment in self.engine.fragments()
            for kind, tensor in fragment.tensors.items()
        }


def batch(number: int) -> Batch:
    random = np.random.default_rng(number)
    waveform = random.integers(-3000, 3000, 16_000).astype(np.int16)
    tokens = random.integers(9, 60, 12).tolist()
    return collate([Sample(waveform, Tokens(tokens, tokens), "", 0, "", frames=100)])


@pytest.mark.parametrize("has_fp32_gradients", [True, False], ids=["torch-2.10", "torch-2.9"])
def test_zero2_adds_up_gradients_of_bf16_weights_in_fp32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, world: World, has_fp32_gradients: bool
) -> None:
    """And reduces the sum, rounded once; before torch 2.10 each micro-batch's, as their sum would be BF16."""
    monkeypatch.setattr(zero2, "FP32_GRADIENTS", has_fp32_gradients)
    case = Case("zero2", "bf16", tmp_path, model, world, MICRO_BATCHES)
    reduced = count_reduced(monkeypatch)
    case.backward()
    gradients = case.gradients()
    elements = sum(gradient.numel() for gradient in gradients[0].values())
    assert sum(reduced) == pytest.approx(elements * (1 if has_fp32_gradients else MICRO_BATCHES), rel=1e-3)
    update = case.engine.step(1e-3)
    sums = {name: sum(each[name] for each in gradients) for name in gradients[0]}
    if has_fp32_gradients:
        sums = {name: gradient.bfloat16().float() for name, gradient in sums.items()}
    length = norm(list(sums.values()))
    assert update.applied and update.grad_norm == pytest.approx(length, rel=1e-4)
    errors = [
        fragment.tensors["exp_avg"] / 0.1 - sums[fragment.name][fragment.start : fragment.end]
        for fragment in case.engine.fragments()
    ]
    assert norm(errors) / length < 1e-3


CHANGED = ZeroOptimization(
    overlap_comm=True,
    reduce_bucket_size=1_000_000,
    allgather_bucket_size=1_000_000,
    contiguous_gradients=False,
    reduce_scatter=False,
    use_multi_rank_bucket_allreduce=False,
).model_dump()


def test_what_may_be_set_of_deepspeed_changes_no_bit(tmp_path: Path, model: Path, world: World) -> None:
    assert CHANGED.keys() == ZeroOptimization.model_fields.keys()
    states = []
    for zero in ({}, CHANGED):
        case = Case("zero2", "fp32", tmp_path, model, world, 2, zero)
        case.backward()
        case.engine.step(1e-3)
        states.append(case.state())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.cat(tensors).double().norm())


def count_reduced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each large reduction from now on."""
    reduced: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if tensor.numel() > 100:
            reduced.append(tensor.numel())
        return all_reduce(tensor, *rest, **named)

    monkeypatch.setattr(dist, "all_reduce", counted)
    return reduced


@pytest.mark.parametrize(("backend", "dtype"), [("zero2", "bf16"), ("fsdp2", "fp32")])
def test_a_gradient_that_is_not_finite_changes_nothing(
    tmp_path: Path, model: Path, world: World, backend: str, dtype: str
) -> None:
    """Neither weights nor moments nor AdamW's counter, nor the step after it."""
    case, undisturbed = (Case(backend, dtype, tmp_path, model, world, 2) for _ in range(2))
    for each in (case, undisturbed):
        each.backward()
        assert each.engine.step(1e-3).applied
    before = case.state()
    for factor in (float("nan"), float("inf")):
        case.backward(factor)
        update = case.engine.step(1e-3)
        assert not update.applied and not np.isfinite(update.grad_norm)
        assert all(torch.equal(tensor, before[name]) for name, tensor in case.state().items())
        assert case.engine.updates() == 1
    for each in (case, undisturbed):
        each.backward()
        assert each.engine.step(1e-3).applied and each.engine.updates() == 2
    after = undisturbed.state()
    assert all(torch.equal(tensor, after[name]) for name, tensor in case.state().items())


def test_the_norm_of_a_large_gradient_is_exact(world: World) -> None:
    """In float32 that of 20 million elements, a token embedding's, is off by a hundredth on a CPU, and so
    would be what is clipped."""
    gradient = torch.full((20_000_000,), 0.1)
    exact = float(torch.tensor(0.1)) * 20_000_000**0.5
    assert float(global_norm([gradient])) == pytest.approx(exact, rel=1e-6)
