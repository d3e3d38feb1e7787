"""Linears through oneDNN: torch's values and gradients, on every path."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from s3distill import products
from s3distill.encoder.config import EncoderConfig, LayerConfig, parse_conv_layers, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from tests.gradients import gradients

needs_kernel = pytest.mark.skipif(products._onednn_product() is None, reason="torch has no oneDNN product here")


@pytest.fixture(autouse=True)
def _small_products_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_LEAST", 1)


def operands(dtype: torch.dtype, rows: tuple[int, ...] = (2, 7), size: tuple[int, int] = (24, 40)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(*rows, size[1]), size, size[:1]]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(24, 40), (40, 24), (1, 3)])
@pytest.mark.parametrize("rows", [(5,), (2, 7), (2, 3, 4)])
def test_linear_has_torchs_values_and_gradients(
    dtype: torch.dtype, size: tuple[int, int], rows: tuple[int, ...]
) -> None:
    x, weight, bias = operands(dtype, rows, size)
    for inputs in ([x, weight, bias], [x, weight]):
        found, expected = products.linear(*inputs), F.linear(*inputs)
        torch.testing.assert_close(found, expected)
        for ours, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
            torch.testing.assert_close(ours, theirs)
            assert ours.stride() == theirs.stride(), "or the optimizer would have to copy"
    with torch.no_grad():
        torch.testing.assert_close(products.linear(x, weight, bias), F.linear(x, weight, bias))


@needs_kernel
def test_float32_takes_the_kernel_and_float64_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    kernel = products._onednn_product()
    assert kernel is not None

    def counted(x: Tensor, *arguments: object) -> Tensor:
        calls.append(x.dtype)
        return kernel(x, *arguments)

    monkeypatch.setattr(products, "_onednn_product", lambda: counted)
    for dtype in (torch.float32, torch.float64):
        products.linear(*operands(dtype)).sum().backward()
    assert set(calls) == {torch.float32} and len(calls) == 3  # forward, dx, and dW since 40 > 24
    monkeypatch.setattr(products, "_LEAST", 14 * 24 * 40 + 1)
    products.linear(*operands(torch.float32)).sum().backward()
    assert len(calls) == 3, "too small to be worth it"
    monkeypatch.setattr(products, "_LEAST", 1)
    monkeypatch.setattr(products, "_onednn_product", lambda: None)
    x, weight, bias = operands(torch.float32)
    torch.testing.assert_close(products.linear(x, weight, bias), F.linear(x, weight, bias))
    assert len(calls) == 3


def test_only_what_learns_gets_a_gradient() -> None:
    x, weight, bias = operands(torch.float32)
    products.linear(x, weight.detach(), bias.detach()).sum().backward()
    assert x.grad is not None and weight.grad is None
    products.linear(x.detach(), weight, bias.detach()).sum().backward()
    assert weight.grad is not None and bias.grad is None


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    _, weight, bias = operands(torch.float32)
    assert products.linear(torch.zeros(shape), weight, bias).shape == (*shape[:-1], 24)
    assert torch.equal(products.linear(torch.zeros(3, 0), torch.zeros(24, 0), bias), bias.expand(3, -1))


@needs_kernel
def test_torchs_counter_of_operations_knows_the_kernel() -> None:
    x, weight, bias = operands(torch.float32)
    with FlopCounterMode(display=False) as counter:
        products.linear(x, weight, bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 14 * 24 * 40


def as_linear(kind: type[nn.Linear], weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = kind(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
    return linear


def test_several_linears_under_autocast_are_those_one_by_one() -> None:
    x, weight, bias = operands(torch.float32)
    modules = [as_linear(products.Linear, weight[:n], bias[:n]) for n in (24, 8, 16)]
    inputs = [x, *(p for module in modules for p in module.parameters())]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = products.linears(x, modules), [module(x) for module in modules]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs)
    ours, theirs = (gradients(torch.cat([*parts], -1).float(), inputs) for parts in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.02 * b.norm()  # three gradients of x are summed before they are rounded


def test_linears_calls_what_is_not_plain_or_not_under_autocast() -> None:
    x, weight, bias = operands(torch.float32)
    modules = [as_linear(products.Linear, weight, bias) for _ in range(2)]
    calls: list[int] = []
    modules[1].register_forward_hook(lambda *_: calls.append(1))
    with torch.autocast("cpu", torch.bfloat16):
        products.linears(x, modules)
    assert calls == [1]
    for output in products.linears(x, modules[:1] * 2):
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_frozen_linear_computes_what_it_did_and_can_be_cast(dtype: torch.dtype) -> None:
    x, weight, bias = (t.detach() for t in operands(dtype))
    root = nn.Sequential(nn.Sequential(as_linear(products.Linear, weight, bias)), as_linear(nn.Linear, weight, bias))
    products.freeze_linears(root)
    assert type(root[1]) is nn.Linear, "only the project's own"
    frozen = root[0][0]
    packed = products._can_freeze(weight)
    can = {torch.float32: True, torch.bfloat16: products._has_bfloat16(), torch.float64: False}[dtype]
    assert packed == (can and products._onednn_product() is not None)
    assert isinstance(frozen, products.FrozenLinear) == packed
    with torch.inference_mode():
        for rows in (x, x[:, :1], x[0].repeat(40, 1)):
            torch.testing.assert_close(frozen(rows), F.linear(rows, weight, bias))
        root.double()
        torch.testing.assert_close(frozen(x.double()), F.linear(x.double(), weight.double(), bias.double()))
        root.to(dtype)
        torch.testing.assert_close(frozen(x), F.linear(x, weight, bias))


def pruned_to_nothing() -> tuple[LayerConfig, ...]:
    """Layers that gates left without heads, without a feed-forward part, and without both."""
    whole = uniform_layers(2, 4, 8, 48)[0]
    return tuple(dataclasses.replace(whole, num_heads=heads, ffn_dim=ffn) for heads, ffn in [(0, 48), (4, 0), (0, 0)])


@pytest.mark.parametrize("layers", [uniform_layers(2, 4, 8, 48), pruned_to_nothing()], ids=["whole", "nothing left"])
def test_a_frozen_encoder_computes_what_it_did(layers: tuple[LayerConfig, ...]) -> None:
    config = EncoderConfig(parse_conv_layers("[(16, 10, 5)] + [(16, 3, 2)] * 2"), 32, layers, pos_conv_kernel=16)
    for norm_first in (False, True):
        torch.manual_seed(0)
        encoder = SpeechEncoder(dataclasses.replace(config, layer_norm_first=norm_first, pos_conv_groups=4)).eval()
        frozen = copy.deepcopy(encoder).requires_grad_(False)
        frozen.freeze()
        source = torch.randn(2, 900)
        with torch.inference_mode():
            torch.testing.assert_close(frozen(source).x, encoder(source).x, rtol=1e-5, atol=1e-5)
        names = {name.rpartition(".")[2] for name in frozen.state_dict()}
        assert not names & {"frozen_weight", "weight_v", "weight_g"}, "nothing is held twice"


def test_the_report_says_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    found = products.report()
    assert ("oneDNN" in found.implementation) == (products._onednn_product() is not None)
    monkeypatch.setattr(products, "_onednn_product", lambda: None)
    assert products.report().implementation == "torch linear"
