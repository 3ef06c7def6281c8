"""Before the model loads, a node that is worse than the others is named, and sound ones are left alone."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from configs.errors import DataError, EarwitnessError, UnfitNode
from trainer import preflight
from trainer.preflight import Finding, Gpu, matmul_tflops

H100, A100, UNKNOWN = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "NVIDIA Z1"


def finding(
    node: str,
    problem: str = "",
    error_type: type[EarwitnessError] = EarwitnessError,
    versions: str = "torch 2",
) -> Finding:
    problems = {"clock": problem} if problem else {}
    return Finding(node, problems, "c0de", versions, error_type=error_type)


@pytest.mark.parametrize(
    ("findings", "node", "words"),
    [
        ([finding("n1"), finding("n2", "+100 s off")], "n2", "n2 is unfit: clock: +100 s off"),
        (
            [finding("n1"), finding("n2"), finding("n3", versions="torch 1")],
            "n3",
            "n3 has other versions than most: torch 1 instead of torch 2",
        ),
        ([finding("n1", "off"), finding("n2", "off")], None, "before the start, on all nodes: clock: off"),
        ([finding("n1", "no such key", error_type=DataError)], None, "on all nodes: clock: no such key"),
        # Of one node nobody knows whether another one would do.
        ([finding("n1", "off")], "n1", "n1 is unfit"),
    ],
)
def test_what_differs_from_the_others_is_unfit_and_what_all_have_is_not_a_nodes_fault(
    findings: list[Finding], node: str | None, words: str
) -> None:
    error = preflight._compare(findings)
    assert words in str(error) and getattr(error, "node", None) == node
    assert isinstance(error, DataError) == (findings[0].error_type is DataError)


def with_gpus(**speeds: list[float]) -> list[Finding]:
    """Findings of ranks, each on a node of its own: n0, n1 ..."""
    cards = {"h100": H100, "a100": A100, "unknown": UNKNOWN}
    gpus = [Gpu(cards[card], tflops) for card, all_of_card in speeds.items() for tflops in all_of_card]
    return [Finding(f"n{number}", {}, "c0de", "torch 2", gpu) for number, gpu in enumerate(gpus)]


@pytest.mark.parametrize(
    ("findings", "node"),
    [
        (with_gpus(h100=[650, 655, 640, 200, 650, 645, 660, 650]), "n3"),
        (with_gpus(h100=[650, 650], a100=[250, 250, 60]), "n4"),
        (with_gpus(unknown=[100, 100, 60]), "n2"),
    ],
    ids=["one of eight", "one of another kind", "of a card that nobody knows"],
)
def test_a_gpu_that_is_slow_beside_those_of_its_kind_is_unfit(findings: list[Finding], node: str) -> None:
    error = preflight._compare(findings)
    assert isinstance(error, UnfitNode) and error.node == node and "TFLOP/s" in str(error)


@pytest.mark.parametrize(
    "findings",
    [
        with_gpus(h100=[650, 650, 650, 650], a100=[250, 250]),
        with_gpus(h100=[650 * share for share in (1.2, 0.8, 1.1, 0.9, 1.2, 0.8, 1.0, 1.0)]),
        with_gpus(unknown=[100 * share for share in (1.2, 0.8, 1.1, 0.9)]),
        with_gpus(h100=[650, 650, 650, 400]),  # less than the others, but as fast as such a card may be
    ],
    ids=["two kinds of cards", "noise of a fifth", "noise of an unknown card", "above a third of its peak"],
)
def test_sound_gpus_are_fit_and_nothing_is_said(findings: list[Finding]) -> None:
    assert preflight._compare(findings) is None
    assert preflight._notes(findings) == []


def test_where_all_gpus_are_slow_it_is_told_and_training_goes_on() -> None:
    findings = with_gpus(h100=[120, 150, 130], a100=[250, 250])
    assert preflight._compare(findings) is None
    (note,) = preflight._notes(findings)
    assert f"all GPUs are slow: {H100} does 150 TFLOP/s at most" in note and "989 by its data sheet" in note


class Cold:
    """Matrix products on a clock of their own: the first ones take ten times as long. `error` is added to an
    element of each."""

    def __init__(self, error: float = 0.0) -> None:
        self.seconds, self.products, self.error = 0.0, 0, error
        self._mm = torch.mm

    def mm(self, left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        self.products += 1
        if self.products == 1:
            assert left.unique().numel() > 100, "the same number everywhere needs less power than real ones"
        self.seconds += 0.01 if self.products <= 20 else 0.001
        self._mm(left, right, out=out)
        out[4, 7] += self.error
        return out


def measured(monkeypatch: pytest.MonkeyPatch, clock: Cold, **given: Any) -> float:
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "MATRIX", 64)
        patch.setattr(torch, "mm", clock.mm)
        patch.setattr(time, "perf_counter", lambda: clock.seconds)
        return matmul_tflops(torch.device("cpu"), **given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_speed_is_that_of_a_warm_gpu_over_a_fifth_of_a_second(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    clock = Cold()
    speed = measured(monkeypatch, clock, dtype=dtype)
    assert speed == pytest.approx(2 * 64**3 / 0.001 / 1e12)
    assert clock.products >= 20 + 200


@pytest.mark.parametrize("error", [2.0, float("nan")])
def test_a_product_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    with pytest.raises(ArithmeticError, match="a matrix product is wrong"):
        measured(monkeypatch, Cold(error))


def test_it_measures_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "MATRIX", 256)
    began = time.perf_counter()
    speed = matmul_tflops(torch.device("cpu"), torch.float32)
    assert time.perf_counter() - began > preflight.MEASURED_SECONDS
    assert 0.001 < speed < 100
