"""Floating-point operations of a training step, and the peak of known cards, for MFU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import WhisperConfig

PEAK_TFLOPS = {
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "A6000": 155,
    "A10": 125,
    "B200": 2250,
    "RTX 4090": 165,
}
"""Dense BF16 TFLOP/s by the vendor's data sheets, by a part of the device's name."""


def step_flops(config: WhisperConfig, positions: int, tokens: float, *, recompute: bool = False) -> float:
    """FLOPs of forward and backward for one sample: `positions` in the encoder (half the mel frames),
    `tokens` in the decoder.

    Matrix products only, as torch's FlopCounterMode counts them on eager attention; recomputed activations do
    not count for MFU.
    """
    d, mel, vocab, s, t = config.d_model, config.num_mel_bins, config.vocab_size, positions, tokens
    ff_encoder, ff_decoder = config.encoder_ffn_dim, config.decoder_ffn_dim
    first_convolution = 12 * mel * d * s
    convolutions = first_convolution + 6 * d * d * s
    encoder = config.encoder_layers * (2 * s * (4 * d * d + 2 * d * ff_encoder) + 4 * s * s * d)
    decoder = config.decoder_layers * (
        2 * t * (4 * d * d + 2 * d * ff_decoder)
        + 4 * t * t * d
        + 4 * t * d * d
        + 4 * s * d * d
        + 4 * t * s * d
    )
    forward = convolutions + encoder + decoder + 2 * t * d * vocab
    return 3 * forward - first_convolution + (encoder + decoder if recompute else 0)


def peak_flops(setting: float | None, device: torch.device) -> float | None:
    """Peak FLOP/s of a device: `monitor.peak_tflops`, or by its name; None if neither is known."""
    if setting is not None:
        return setting * 1e12
    if device.type != "cuda":
        return None
    tflops = data_sheet_tflops(torch.cuda.get_device_name(device))
    return None if tflops is None else tflops * 1e12


def data_sheet_tflops(name: str) -> float | None:
    """Peak TFLOP/s of the card that a device's name names; None if it is not known."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
