"""The first convolution and its GroupNorm in one product: the values and gradients of the two, and the digits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3distill.encoder.config import EncoderConfig, parse_conv_layers, uniform_layers
from s3distill.encoder.conv import ConvExtractor
from s3distill.encoder.first_layer import conv_group_norm

NUM_VALID = torch.tensor([40, 17, 1])


def make_layer(bias: bool = False, dtype: torch.dtype = torch.float64) -> tuple[nn.Conv1d, nn.GroupNorm]:
    torch.manual_seed(0)
    conv, norm = nn.Conv1d(1, 6, 10, stride=5, bias=bias), nn.GroupNorm(6, 6)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    return conv.to(dtype), norm.to(dtype)


def separately(x: Tensor, conv: nn.Conv1d, norm: nn.GroupNorm, num_valid: Tensor | None) -> Tensor:
    """In the type of its arguments."""
    y = conv(x)
    if num_valid is None:
        return F.group_norm(y, 6, norm.weight, norm.bias, norm.eps)
    rows = [F.group_norm(row[None, :, :n], 6, norm.weight, norm.bias, norm.eps) for row, n in zip(y, num_valid)]  # noqa: B905
    return torch.cat([F.pad(row, (0, y.shape[2] - row.shape[2])) for row in rows])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_valid", [None, NUM_VALID[:2]])
def test_values_and_gradients(num_valid: Tensor | None, bias: bool) -> None:
    conv, norm = make_layer(bias)
    x = torch.randn(2, 1, 205, dtype=torch.float64)
    valid = torch.ones(2, 1, 40) if num_valid is None else (torch.arange(40) < num_valid[:, None])[:, None]
    expected, found = separately(x, conv, norm, num_valid) * valid, conv_group_norm(x, conv, norm, num_valid) * valid
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    parameters = [*conv.parameters(), *norm.parameters()]
    ours, theirs = (torch.autograd.grad((y * weights).sum(), parameters) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert not bias or (ours[1] == 0).all(), "the norm takes the bias away: a gradient of 0, not a missing one"


def test_a_single_valid_frame_and_silence_are_finite() -> None:
    conv, norm = make_layer(dtype=torch.float32)
    for x in (torch.randn(3, 1, 205), torch.zeros(3, 1, 205), torch.full((3, 1, 205), 3.0)):
        y = conv_group_norm(x, conv, norm, NUM_VALID)
        y.sum().backward()
        assert y.isfinite().all() and conv.weight.grad.isfinite().all()
    torch.testing.assert_close(y, norm.bias[:, None].expand_as(y), rtol=1e-4, atol=1e-4)  # a constant has no variance


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_digits_are_kept_where_windows_are_nearly_alike(offset: float) -> None:
    """A hum with a little noise: neighbouring samples hardly differ, so that the covariance is nearly singular.

    The first channel sees the noise alone, 1/400 of what its taps see; with a covariance in float32 its variance would be
    wrong by percents.
    """
    conv, norm = make_layer(dtype=torch.float32)
    with torch.no_grad():
        conv.weight[0] = torch.tensor([1.0, -2, 1, 0, 0, 0, 0, 0, 0, 0])
    generator = torch.Generator().manual_seed(1)
    time = torch.arange(16_000) / 16_000
    hum = torch.sin(2 * torch.pi * 50 * time) + 1e-3 * torch.randn(16_000, generator=generator) + offset
    x = hum[None, None]
    expected = separately(x.double(), *make_double(conv, norm), None)
    assert (conv_group_norm(x, conv, norm, None).double() - expected).abs().max() <= 5e-4


def make_double(conv: nn.Conv1d, norm: nn.GroupNorm) -> tuple[nn.Conv1d, nn.GroupNorm]:
    copies = make_layer()
    for copy, original in zip(copies, (conv, norm), strict=True):
        copy.load_state_dict({k: v.double() for k, v in original.state_dict().items()})
    return copies


def test_the_extractor_takes_it_where_it_may() -> None:
    """A waveform that wants a gradient, and a module with a hook, get the two steps."""
    config = EncoderConfig(parse_conv_layers("[(6, 10, 5)] + [(8, 3, 2)]"), 16, uniform_layers(1, 2, 8, 16))
    torch.manual_seed(0)
    extractor, source = ConvExtractor(config), torch.randn(2, 400)
    expected = extractor(source)
    wanted = source.clone().requires_grad_()
    found = extractor(wanted)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert wanted.grad is not None and wanted.grad.abs().sum() > 0
    seen: list[torch.Size] = []
    handle = extractor.conv_layers[0].conv.register_forward_hook(lambda *a: seen.append(a[2].shape))
    torch.testing.assert_close(extractor(source), expected, rtol=1e-5, atol=1e-5)
    handle.remove()
    assert seen == [(2, 6, 79)]
