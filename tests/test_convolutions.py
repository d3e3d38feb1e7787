"""Convolutions in channels-last order: torch's values and gradients, for every shape of kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from s3distill import convolutions, products
from tests.gradients import gradients

KERNELS = [(3, 2), (2, 2), (1, 1), (1, 2), (5, 1), (10, 5), (4, 3), (2, 3)]  # (kernel, stride)


@pytest.fixture(autouse=True)
def _small_products_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_LEAST", 1)


def operands(kernel: int, num_frames: int, dtype: torch.dtype, channels: tuple[int, int] = (5, 6)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(kernel + num_frames)
    shapes = [(2, channels[0], num_frames), (channels[1], channels[0], kernel), (channels[1],)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def check(found: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_frames", [10, 29, 30, 31])
@pytest.mark.parametrize(("kernel", "stride"), KERNELS)
def test_values_and_gradients(kernel: int, stride: int, num_frames: int, dtype: torch.dtype) -> None:
    x, weight, bias = operands(kernel, num_frames, dtype)
    for inputs in ([x, weight, bias], [x, weight]):
        bias_or_none = inputs[2] if len(inputs) == 3 else None
        found = convolutions.conv1d(x, weight, bias_or_none, stride)
        check(found, F.conv1d(x, weight, bias_or_none, stride), inputs)
        assert found.transpose(1, 2).is_contiguous(), "[B, T, C] in memory"
        with torch.no_grad():
            assert torch.equal(convolutions.conv1d(x, weight, bias_or_none, stride), found)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (10, 5)])
def test_one_input_channel(kernel: int, stride: int) -> None:
    x, weight, bias = operands(kernel, 53, torch.float32, (1, 6))
    found = convolutions.conv1d(x, weight, bias, stride)
    check(found, F.conv1d(x, weight, bias, stride), [x, weight, bias])
    assert found.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_inputs_are_unfolded_piece_by_piece(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = operands(3, 101, dtype)
    expected, sizes, product = F.conv1d(x, weight, bias, 2), [], convolutions.product

    def noted(rows: Tensor, *arguments: Tensor) -> Tensor:
        sizes.append(rows.numel() * rows.itemsize)
        return product(rows, *arguments)

    monkeypatch.setattr(convolutions, "product", noted)
    monkeypatch.setattr(convolutions, "_UNFOLDED", 400)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    check(convolutions.conv1d(x, weight, bias, 2), expected, [x, weight, bias], tolerance)
    # 50 frames of 60 bytes in each of two rows, 6 at a time; bfloat16 is not unfolded
    assert sizes == ([360] * 8 + [120]) * 2 * (dtype == torch.float32)


def test_layouts_of_the_input_make_no_difference() -> None:
    x, weight, bias = operands(3, 31, torch.float32)
    last = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([x.detach(), x.detach()], 1)[:, :5]
    expected = convolutions.conv1d(x, weight, bias, 2)
    for other in (last, wide):
        assert torch.equal(convolutions.conv1d(other, weight, bias, 2), expected)


def test_autocast_gives_bfloat16_and_float32_gradients() -> None:
    x, weight, bias = operands(3, 31, torch.float32)
    inputs = [x, weight, bias]
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [
            (convolutions.conv1d(x, weight, bias, 2), F.conv1d(x, weight, bias, 2)),
            (convolutions.grouped_conv1d(x, weight, bias, 1, 1), F.conv1d(x, weight, bias, padding=1)),
        ]
        with torch.no_grad():
            silent = convolutions.grouped_conv1d(x, weight, bias, 1, 1)
    assert torch.equal(silent, pairs[1][0])
    for found, expected in pairs:
        assert found.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        for ours, theirs in zip(gradients(found.float(), inputs), gradients(expected.float(), inputs), strict=True):
            assert ours.dtype == torch.float32
            assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_a_half_precision_weight_gradient_is_summed_in_float32() -> None:
    """Many rows whose gradients are alike: a running sum in bfloat16 would stop growing at 256 times a summand."""
    frames, grad = torch.ones(2000, 4, 1), torch.ones(2000, 2, 1)
    found = convolutions.conv_weight_gradient(grad.bfloat16(), frames.bfloat16(), 3, 1)
    assert found.flatten().tolist() == [4000.0] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("groups", "kernel"), [(1, 3), (2, 4), (3, 7)])
def test_grouped(groups: int, kernel: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 12, 19), (6, 12 // groups, kernel), (6,)]
    x, weight, bias = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes)
    padding = kernel // 2
    found = convolutions.grouped_conv1d(x, weight, bias, padding, groups)
    check(found, F.conv1d(x, weight, bias, padding=padding, groups=groups), [x, weight, bias])
    laid_out = convolutions.grouped_weight(weight.detach())
    assert torch.equal(laid_out, weight) and convolutions.grouped_weight(laid_out).data_ptr() == laid_out.data_ptr()
    with torch.no_grad():
        assert torch.equal(convolutions.grouped_conv1d(x, laid_out, bias, padding, groups), found)


def test_frozen_parts_get_no_gradient() -> None:
    x, weight, bias = operands(3, 31, torch.float32)
    convolutions.conv1d(x.detach(), weight, bias, 2).sum().backward()
    assert weight.grad is not None and bias.grad is not None
    weight.grad = bias.grad = None
    for output in (
        convolutions.conv1d(x, weight.detach(), None, 2),
        convolutions.grouped_conv1d(x, weight.detach(), bias.detach(), 1, 1),
    ):
        x.grad = None
        output.sum().backward()
        assert x.grad is not None and weight.grad is None and bias.grad is None
