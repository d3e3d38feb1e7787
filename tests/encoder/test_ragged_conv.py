"""Convolutions whose groups differ: against one dense convolution with zeros, and gate-weighted norms in closed form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from s3distill.encoder.layers import LayerNorm, gated_norm, normalize_open, open_share
from s3distill.encoder.ragged_conv import RaggedConv, split_groups

groups = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=4).filter(
    lambda sizes: any(o for _, o in sizes)
)


@settings(deadline=None, max_examples=40)
@given(groups, st.integers(1, 6), st.booleans())
def test_it_is_a_dense_convolution_with_zeros_between_groups(
    sizes: list[tuple[int, int]], kernel: int, weight_norm: bool
) -> None:
    torch.manual_seed(0)
    inputs, outputs = (tuple(side) for side in zip(*sizes, strict=True))
    conv = RaggedConv(inputs, outputs, kernel, weight_norm)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.normal_()
    weight = conv.weight_v * conv.weight_g / conv.weight_v.norm(dim=(0, 1)) if weight_norm else conv.weight
    dense = torch.block_diag(*(w.flatten(1) for w in split_groups(weight, inputs, outputs)))
    # [outputs, inputs * K] in blocks -> [outputs, inputs, K]
    dense = dense.view(sum(outputs), sum(inputs), kernel)
    x = torch.randn(2, sum(inputs), 9)
    expected = F.conv1d(x, dense, conv.bias, padding=kernel // 2)[:, :, :9]
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)


def test_equal_groups_are_torchs_grouped_convolution() -> None:
    conv = RaggedConv((3, 3), (3, 3), 4, weight_norm=False)
    x = torch.randn(2, 6, 9)
    grouped = F.conv1d(x, conv.weight.detach().view(6, 3, 4), conv.bias, padding=2, groups=2)[:, :, :9]
    torch.testing.assert_close(conv(x), grouped)


@pytest.mark.parametrize("training", [True, False])
def test_gated_norm_in_closed_form(training: bool) -> None:
    """One loop over the open channels; the gate weights the statistics as it is in training, as 0 or 1 in evaluation."""
    torch.manual_seed(0)
    norm = LayerNorm(5).train(training)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    gate, x = torch.tensor([0.5, 0.0, 1.0, 0.2, 0.9]), torch.randn(3, 5)
    weight = gate if training else (gate > 0).float()
    got = gated_norm(norm, x, gate)
    for row, result in zip(x, got, strict=True):
        mean = sum(w * v for w, v in zip(weight, row, strict=True)) / weight.sum()
        variance = sum(w * (v - mean) ** 2 for w, v in zip(weight, row, strict=True)) / weight.sum()
        expected = gate * ((row - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias)
        torch.testing.assert_close(result, expected)
    assert (got[:, 1] == 0).all()
    if not training:  # the open channels on their own
        open_channels = gate > 0
        alone = F.layer_norm(x[:, open_channels], (4,), norm.weight[open_channels], norm.bias[open_channels])
        torch.testing.assert_close(got[:, open_channels], alone * gate[open_channels])


def test_gradients_of_the_norm_reach_gates_and_channels() -> None:
    torch.manual_seed(0)
    norm = LayerNorm(4)
    x, gate = torch.randn(2, 4, requires_grad=True), torch.tensor([0.5, 0.3, 1.0, 0.8], requires_grad=True)
    # float32 inside, so with wide steps and tolerances
    assert torch.autograd.gradcheck(lambda a, z: gated_norm(norm, a, z), (x, gate), eps=1e-2, atol=2e-2, rtol=2e-2)


def test_open_share() -> None:
    gate = torch.tensor([0.0, 0.4, 1.0])
    assert torch.equal(open_share(gate, True), gate)
    assert open_share(gate, False).tolist() == [0, 1, 1]
    assert normalize_open(torch.ones(2, 3), gate).abs().max() == 0
