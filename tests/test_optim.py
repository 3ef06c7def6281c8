"""Learning rate, FLOPs and the choice of what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import WhisperConfig, WhisperForConditionalGeneration

from configs.errors import ConfigError
from configs.schema import Model, Optim
from trainer import model as models
from trainer.flops import step_flops
from trainer.optim import adamw, learning_rate


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("linear", 0.5, 1 / 90), ("cosine", 0.5, 3.05e-4), ("constant", 1.0, 1.0)],
)
def test_schedules_warm_up_to_the_peak_and_end_where_they_should(
    schedule: str, middle: float, last: float
) -> None:
    settings = Optim(lr=1.0, schedule=schedule, warmup_fraction=0.1, max_steps=100)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert (
        rates[10] == 1.0 and rates[55] == pytest.approx(middle) and rates[99] == pytest.approx(last, rel=1e-2)
    )


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert learning_rate(Optim(lr=2.0, warmup_fraction=0, max_steps=1), 0, 1) == 2.0


def test_flops_equal_what_torch_counts() -> None:
    config = WhisperConfig(
        vocab_size=1000,
        d_model=128,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=512,
        decoder_ffn_dim=256,
        num_mel_bins=80,
        max_source_positions=100,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    network = WhisperForConditionalGeneration(config)
    network.set_attn_implementation("eager")  # the counter misses sdpa on CPUs
    with FlopCounterMode(display=False) as counter:
        network(
            input_features=torch.randn(1, 80, 200),
            decoder_input_ids=torch.ones(1, 16, dtype=torch.long),
            use_cache=False,
        ).logits.sum().backward()
    assert counter.get_total_flops() == pytest.approx(step_flops(config, 100, 16), rel=1e-3)


def test_flops_of_turbo_are_those_published() -> None:
    turbo = WhisperConfig(
        vocab_size=51866,
        d_model=1280,
        encoder_layers=32,
        decoder_layers=4,
        encoder_ffn_dim=5120,
        decoder_ffn_dim=5120,
        num_mel_bins=128,
    )
    assert step_flops(turbo, 1500, 100) == pytest.approx(7.04e12, rel=1e-3)


def test_only_the_fixed_positions_and_what_is_named_stay_untrained(model: Path) -> None:
    everything = models.load(Model(name_or_path=str(model)), seed=0)
    assert {name for name, p in everything.model.named_parameters() if not p.requires_grad} == {
        "model.encoder.embed_positions.weight"
    }
    less = models.load(Model(name_or_path=str(model), freeze=["model.encoder.conv"]), seed=0)
    assert everything.trained.keys() - less.trained.keys() == {
        f"model.encoder.conv{n}.{part}" for n in (1, 2) for part in ("weight", "bias")
    }
    with pytest.raises(ConfigError, match="no parameter's name starts with 'encoder'"):
        models.load(Model(name_or_path=str(model), freeze=["encoder"]), seed=0)


def test_weight_decay_spares_biases_and_norms(model: Path) -> None:
    network = models.load(Model(name_or_path=str(model)), seed=0).model
    with_decay, without = adamw(network, Optim(max_steps=1, weight_decay=0.1)).param_groups
    assert with_decay["weight_decay"] == 0.1 and all(p.ndim >= 2 for p in with_decay["params"])
    assert without["weight_decay"] == 0.0 and all(p.ndim == 1 for p in without["params"])
    assert len(adamw(network, Optim(max_steps=1)).param_groups) == 1


def test_the_same_seed_starts_from_the_same_weights(model: Path) -> None:
    one, other, third = (models.load(Model(name_or_path=str(model)), seed=seed).trained for seed in (1, 1, 2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(
        one["model.decoder.embed_tokens.weight"], third["model.decoder.embed_tokens.weight"]
    )
