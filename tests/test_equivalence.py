"""A step is the same step on any number of ranks and with any micro-batch, and it is the step that a plain
PyTorch loop takes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.run.crash_journal import CrashJournal
from configs.run.folder import RunDir
from data import dataset
from data.batch import Sample
from data.captions import IGNORED, CaptionEncoder
from data.merged import Index
from data.order import rank_lanes
from data.samples import SampleReader
from data.windows import Windows
from tests import stock
from tests.forks import Launcher
from tests.making import audit, config_values, index_in_full, make_clips, run_program
from trainer import checkpoint, model
from trainer.checkpoint import Reader
from trainer.whisper import as_transformers

Case = tuple[str, str, int, int]
"""Backend, precision, ranks, micro-batch."""
CASES = [
    *[("zero2", "fp32", procs, micro) for procs, micro in ((1, 4), (2, 2), (3, 1))],
    ("fsdp2", "fp32", 3, 2),
    *[("zero2", "bf16", procs, micro) for procs, micro in ((1, 4), (3, 2))],
    ("fsdp2", "bf16", 2, 2),
]
KINDS = [("zero2", 1), ("zero2", 2), ("zero2", 4), ("fsdp2", 2)]
ALL_CASES = [
    (backend, precision, procs, micro)
    for precision in ("fp32", "bf16")
    for procs in (1, 2, 3, 4)
    for backend, micro in KINDS
]
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-4}
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLIP = {"fp32": 1e9, "bf16": 1.0}
"""The gradient's norm is 3.3: where it is not clipped, a wrong scale shows in AdamW's moments."""
# 7 samples per step do not divide by 2, 3 or 4; of 30 clips 26 are for training, which leaves a short last
# batch of 5.
STEPS, GLOBAL, SHORT, VALIDATION = 4, 7, 5, 4
fast_or_all = pytest.mark.parametrize(
    "cases", [CASES, pytest.param(ALL_CASES, marks=pytest.mark.slow)], ids=["some", "all"]
)


def curve(run: Path, tag: str) -> list[float]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [point.value for point in events.Scalars(tag)]


def losses(run: Path) -> list[float]:
    return curve(run, "loss")


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, model: Path, launch: Launcher
) -> Callable[[Case], Path]:
    """The run of a case, which is trained when it is asked for first: one epoch, with an uneven split and a
    short last batch."""
    folder = tmp_path_factory.mktemp("runs")
    assert (
        run_program("tools.pack", make_clips(folder / "clips", range(30)), folder / "shards").returncode == 0
    )

    index_in_full(folder, f"{folder}/shards/*.tar")

    @functools.cache
    def train(case: Case) -> Path:
        backend, precision, procs, micro = case
        config = config_values(
            "-".join(map(str, case)),
            folder,
            model,
            f"{folder}/shards/*.tar",
            batch={"global_size": GLOBAL, "micro_seconds": micro},
            optim={"epochs": 1, "lr": 1e-4, "max_steps": None, "clip_grad_norm": CLIP[precision]},
            checkpoint={"every_steps": 1, "keep_last": 100},
            evaluate={"every_steps": 1000, "captions": 0, "max_samples": 100},
            engine={"backend": backend, "dtype": precision},
        )
        assert launch(config, procs=procs).returncode == 0
        return Path(config["run"]["dir"])

    return train


@fast_or_all
@pytest.mark.parametrize("precision", TOLERANCE)
def test_first_loss_is_the_same_for_any_ranks_and_micro_batch(
    trained, cases: list[Case], precision: str
) -> None:
    first = {case: losses(trained(case))[0] for case in cases if case[1] == precision}
    reference = first["zero2", precision, 1, 4]
    largest = max(abs(loss - reference) / reference for loss in first.values())
    print(f"{precision}: first losses differ by {largest:.1e} at most")
    assert largest <= TOLERANCE[precision], first


@fast_or_all
@pytest.mark.parametrize("precision", TOLERANCE)
def test_validation_loss_is_that_of_all_its_samples_for_any_ranks_and_micro_batch(
    trained, cases: list[Case], precision: str
) -> None:
    first = {case: curve(trained(case), "validation/loss")[0] for case in cases if case[1] == precision}
    plain = Plain(RunDir(trained(("zero2", precision, 1, 4))), precision)
    samples = plain.load(plain.dataset.validation, range(VALIDATION))
    assert len(plain.dataset.validation) == VALIDATION
    with torch.no_grad():
        expected = plain.loss(samples, whole=True).item() / learnt_tokens(samples)
        at_own_lengths = plain.loss(samples).item() / learnt_tokens(samples)
    for case, loss in first.items():
        assert loss == pytest.approx(expected, rel=TOLERANCE[precision]), case
        own = curve(trained(case), "validation/loss_own")[0]
        assert own == pytest.approx(at_own_lengths, rel=TOLERANCE[precision]), case


@fast_or_all
def test_all_runs_took_the_same_batches(trained, cases: list[Case]) -> None:
    reference = audit(trained(("zero2", "fp32", 1, 4)))
    assert len(reference) == STEPS
    assert sorted(len(keys) for keys in reference.values()) == [SHORT] + [GLOBAL] * (STEPS - 1)
    assert all(audit(trained(case)) == reference for case in cases)
    lines = RunDir(trained(("zero2", "fp32", 3, 1))).audit.read().values
    moved = [set(line["lanes"]) - set(rank_lanes(line["rank"], 3, GLOBAL)) for line in lines]
    assert any(moved), "some were computed by another rank than the one that owns their lane"


MORE_CASES = [
    ("zero2", "fp32", 3, 4),
    ("zero2", "bf16", 1, 2),
    ("zero2", "fp32", 4, 4),
    ("zero2", "bf16", 4, 1),
    ("fsdp2", "fp32", 4, 2),
    ("fsdp2", "bf16", 1, 2),
]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=str
)
def test_gradient_and_update_equal_a_plain_loop(trained, case: Case) -> None:
    """Losses, gradients (from AdamW's first moment) and weights after each of two steps, against fp32 masters
    in plain PyTorch."""
    _, precision, _, micro = case
    run = RunDir(trained(case))
    rough = 2e-3 if precision == "fp32" else 0.15
    norms = curve(run.path, "grad_norm")
    for step, expected in enumerate(plain_loop(run, steps=2, micro=micro, precision=precision), 1):
        reader = Reader(run.checkpoints / f"step-{step:08d}")
        assert losses(run.path)[step - 1] == pytest.approx(
            expected.loss, rel=TOLERANCE[precision] if step == 1 else 1e-3
        )
        assert norms[step - 1] == pytest.approx(expected.norm, rel=1e-4 if precision == "fp32" else 1e-2)
        if step == 1:
            moments = {
                name: reader(name, "exp_avg", 0, value.numel()).view_as(value) / 0.1
                for name, value in expected.clipped.items()
            }
            assert distance(moments, expected.clipped) < (1e-5 if precision == "fp32" else 1e-2)
        found = {name: reader.tensor(name) for name in expected.weights}
        start = model.load(run.read_config().model, 7).trained
        moved = {name: value - start[name].detach() for name, value in expected.weights.items()}
        error = {name: found[name] - expected.weights[name] for name in expected.weights}
        assert norm(error) / norm(moved) < rough


def test_short_last_batch_counts_its_own_tokens(trained) -> None:
    last = {case: losses(trained(case))[-1] for case in CASES if case[1] == "fp32"}
    assert max(last.values()) - min(last.values()) < 1e-4, last


class Plain:
    """A run's model as it begins, and its samples, without engine, ranks or the trainer's loss."""

    def __init__(self, run: RunDir, precision: str) -> None:
        self.config = run.read_config()
        self.captioner = model.load(self.config.model, self.config.run.seed)
        self.dataset = dataset.open_dataset(self.config, run.path)
        self.order = self.dataset.order(self.config)
        self.windows = Windows.of(self.config, self.captioner.frames)
        self.masters = {
            name: p.detach().clone().requires_grad_() for name, p in self.captioner.trained.items()
        }
        self.precision, self.dtype = precision, DTYPE[precision]
        transformers = as_transformers(self.captioner.model, self.captioner.generation)
        self.network = transformers.to(self.dtype).train()

    def load(self, index: Index, rows: Iterable[int]) -> list[Sample]:
        encoder = CaptionEncoder(
            self.captioner.tokenizer, self.captioner.prefix, positions=64, long_caption="truncate"
        )
        samples = SampleReader(
            index,
            encoder,
            windows=self.windows,
            max_seconds=self.captioner.frames / 100,
            overlong="skip",
            seed=self.config.run.seed,
            crash_journal=CrashJournal(1),
        )
        return [samples.load(int(row)) for row in rows]

    def loss(self, samples: list[Sample], *, whole: bool = False) -> torch.Tensor:
        """Cross-entropy, summed over the tokens of the captions, of transformers' Whisper with a window as
        long as each clip; in fp32 as Hugging Face has it, too. whole: each is padded."""
        total, of_transformers = torch.zeros(()), 0.0
        for sample in samples:
            clip = replace(sample, frames=self.windows.whole) if whole else sample
            logits = stock.logits(self.network, clip, self.windows.whole).float()
            for position, token in enumerate(sample.tokens.labels):
                if token != IGNORED:
                    total = total - logits[position].log_softmax(0)[token]
            labels = torch.tensor([sample.tokens.labels])
            mean = self.network.loss_function(
                logits[None], labels, self.network.config.vocab_size, shift_labels=labels
            )
            of_transformers += mean.item() * learnt_tokens([sample])
        assert of_transformers == pytest.approx(total.item(), rel=1e-5)
        return total


def learnt_tokens(samples: list[Sample]) -> int:
    return sum(token != IGNORED for sample in samples for token in sample.tokens.labels)


@dataclass
class Taken:
    """A step of the plain loop: loss per token, norm of the gradient before clipping, clipped gradient, and
    weights afterwards."""

    loss: float
    norm: float
    clipped: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def plain_loop(run: RunDir, steps: int, micro: int, precision: str) -> Iterator[Taken]:
    """The same steps without DeepSpeed."""
    plain = Plain(run, precision)
    config, masters = plain.config, plain.masters
    lanes = plain.order.lanes(0, rank_lanes(0, 1, GLOBAL))
    optimizer = torch.optim.AdamW(
        masters.values(), betas=config.optim.betas, eps=config.optim.eps, weight_decay=0.0
    )
    for step in range(steps):
        samples = plain.load(plain.dataset.training, lanes[:, step])
        tokens = learnt_tokens(samples)
        total, sums = 0.0, {name: torch.zeros_like(master) for name, master in masters.items()}
        for first in range(0, GLOBAL, micro):
            loss = plain.loss(samples[first : first + micro]) / tokens
            plain.network.zero_grad()
            loss.backward()
            total += loss.item()
            for name, parameter in plain.network.named_parameters():
                if name in sums and parameter.grad is not None:
                    sums[name] += parameter.grad.float()
        length = norm(sums)
        clip = min(1.0, config.optim.clip_grad_norm / (length + 1e-6))
        for name, master in masters.items():
            master.grad = sums[name] * clip
        optimizer.param_groups[0]["lr"] = config.optim.lr * (1 - step / STEPS)  # linear, without warm-up
        optimizer.step()
        with torch.no_grad():
            for name, parameter in plain.network.named_parameters():
                if name in masters:
                    parameter.copy_(masters[name])
        yield Taken(
            total,
            length,
            {name: master.grad.clone() for name, master in masters.items()},
            {name: master.detach().clone() for name, master in masters.items()},
        )


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return norm({name: found[name] - expected[name] for name in expected}) / norm(expected)


def test_checkpoints_say_where_every_element_is(trained) -> None:
    for case in CASES:
        newest = checkpoint.find(RunDir(trained(case)).checkpoints)[0]
        for name, about in Reader(newest).manifest.parameters.items():
            ends = sorted((start, end) for start, end, _ in about["fragments"])
            assert ends[0][0] == 0 and ends[-1][1] == math.prod(about["shape"]), name
            assert all(before[1] == after[0] for before, after in itertools.pairwise(ends)), name


@pytest.mark.slow
def test_sources_count_as_their_loss_weights_say_on_any_ranks_and_curves_do_not_weigh(
    tmp_path: Path, model: Path, launch: Launcher
) -> None:
    sources = []
    for name, numbers in (("one", range(14)), ("other", range(14, 28))):
        table = make_clips(tmp_path / f"{name}-clips", numbers)
        assert run_program("tools.pack", table, tmp_path / name).returncode == 0
        index_in_full(tmp_path, f"{tmp_path}/{name}/*.tar")
        sources.append({"name": name, "shards": [f"{tmp_path}/{name}/*.tar"], "validation": 0.2})

    def run(name: str, weights: tuple[float, float], procs: int, micro: float, backend: str) -> RunDir:
        config = config_values(
            name,
            tmp_path,
            model,
            "",
            batch={"global_size": GLOBAL, "micro_seconds": micro},
            optim={"lr": 1e-4, "max_steps": 2, "clip_grad_norm": CLIP["fp32"]},
            engine={"backend": backend, "dtype": "fp32"},
        )
        config["data"]["sources"] = [
            {**source, "loss_weight": weight} for source, weight in zip(sources, weights, strict=True)
        ]
        assert launch(config, procs=procs).returncode == 0
        return RunDir(Path(config["run"]["dir"]))

    plain = run("plain", (1, 1), 1, 4, "zero2")
    weighted = [run("weighted", (1, 4), 1, 4, "zero2"), run("scaled", (0.5, 2), 3, 1, "fsdp2")]
    expected = Plain(weighted[0], "fp32")
    samples = expected.load(expected.dataset.training, expected.order.lanes(0, range(GLOBAL))[:, 0])
    parts = [[sample for sample in samples if sample.source == source] for source in range(2)]
    total = learnt_tokens(parts[0]) + 4 * learnt_tokens(parts[1])
    ((expected.loss(parts[0]) + 4 * expected.loss(parts[1])) / total).backward()
    gradient = {name: p.grad for name, p in expected.network.named_parameters() if name in expected.masters}
    for name in ("loss", "loss/one", "loss/other", "validation/loss"):
        first = [curve(of.path, name)[0] for of in (plain, *weighted)]
        assert first == pytest.approx([first[0]] * 3, rel=1e-6), f"{name} does not weigh"
    for of in weighted:
        assert curve(of.path, "grad_norm")[0] == pytest.approx(norm(gradient), rel=1e-4)
        assert losses(of.path)[1] == pytest.approx(losses(weighted[0].path)[1], rel=1e-5)
    assert curve(plain.path, "grad_norm")[0] != pytest.approx(norm(gradient), rel=1e-2)
