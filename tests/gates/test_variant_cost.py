"""The cost of every variant against the encoder itself: its parameters, and the operations that torch counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from s3distill.encoder.config import EncoderConfig, parse_conv_layers, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.gates import (
    MEASURES,
    UNITS,
    GateCounts,
    GateSet,
    breakdown,
    count_cost,
    count_macs_per_second,
    count_parameters,
    minimum_counts,
)
from tests.encoder.variant_configs import PLAIN, VARIANTS, changed, separated

BASE = EncoderConfig(
    parse_conv_layers("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"), 768, uniform_layers(12, 12, 64, 3072)
)


def num_parameters(config: EncoderConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in SpeechEncoder(config).parameters())


@pytest.mark.parametrize("name", list(VARIANTS))
def test_parameters(name: str) -> None:
    counted = count_parameters(VARIANTS[name], GateCounts.full(VARIANTS[name]))
    assert isinstance(counted, int) and counted == num_parameters(VARIANTS[name])


@pytest.mark.parametrize("seconds", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_macs_are_what_torch_counts(name: str, seconds: float) -> None:
    config = VARIANTS[name]
    if config.attention == "linformer":
        config = dataclasses.replace(config, linformer_max_frames=1000)
    encoder = SpeechEncoder(config).eval().requires_grad_(False)
    # the reference kernel is made of matrix products, which the counter sees
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(torch.randn(1, round(seconds * 16_000)))
    counted = count_macs_per_second(config, GateCounts.full(config), utterance_s=seconds) * seconds
    assert counted == pytest.approx(counter.get_total_flops() / 2, rel=1e-12)


def test_published_figures_of_separable_convolutions() -> None:
    """Layers 2 to 7 of HuBERT Base's extractor, 15.6 s of audio: 4.20 -> 1.59 M parameters, 38.3 -> 13.2 G MACs."""
    separable = separated(BASE, *range(1, 7))
    full = GateCounts.full(BASE)
    assert [round(breakdown(c, full)["conv"] / 1e6, 2) for c in (BASE, separable)] == [4.2, 1.59]
    macs = [breakdown(c, full, "macs")["conv"] * 15.6 / 1e9 for c in (BASE, separable)]
    assert macs == pytest.approx([38.3, 13.2], rel=0.01)


def test_what_variants_save() -> None:
    full = GateCounts.full(BASE)
    layer = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    assert count_parameters(BASE, full) - count_parameters(changed(BASE, shared="all"), full) == 11 * layer
    assert breakdown(changed(BASE, shared="all"), full, "macs") == breakdown(BASE, full, "macs")
    reduced = breakdown(changed(BASE, time_reduction=2), full, "macs")
    whole = breakdown(BASE, full, "macs")
    assert reduced["ffn"] == pytest.approx(whole["ffn"] / 2, rel=0.005) and reduced["pos_conv"] == whole["pos_conv"]
    assert reduced["attention"] < whole["attention"] / 2  # pairs of frames are a quarter
    assert breakdown(changed(BASE, time_reduction=2), full)["time_reduction"] == 2 * 768 * 768 + 768


@pytest.mark.parametrize(
    "name", ["shared_all", "shared_ffn", "reused", "everything_reused", "everything_shared_windowed"]
)
def test_expected_cost_agrees_with_samples(name: str) -> None:
    """Gates in common leave products of expectations the expectation of the product."""
    config = VARIANTS[name]
    gates = GateSet(config, UNITS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.copy_(-0.5 + torch.randn(parameter.shape, generator=generator))
        expected = gates.expected_counts()
        draws = [GateCounts.from_values(config, gates.sample(seed)) for seed in range(600)]
    for measure in MEASURES:
        values = torch.tensor([float(count_cost(config, counts, measure)) for counts in draws], dtype=torch.float64)
        error = values.std().item() / len(draws) ** 0.5
        assert abs(values.mean().item() - float(count_cost(config, expected, measure))) < 4 * error


def test_what_can_be_removed_at_most() -> None:
    for config in (PLAIN, changed(shared="all"), VARIANTS["reused"]):
        least = minimum_counts(config, UNITS)
        assert least.heads == least.ffn == least.attention_layers == (0, 0, 0, 0)
