"""What is computed again in the backward pass has the values and gradients of what is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3distill.encoder.recompute import gelu_conv, gelu_linear
from tests.gradients import gradients


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]


def as_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None).double()
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_linear_has_values_and_gradients_of_the_modules(gated: bool, has_bias: bool) -> None:
    x, gate, weight, bias = leaves((2, 3, 5), (5,), (4, 5), (4,))
    linear = as_linear(weight, bias if has_bias else None)
    inner = F.gelu(x) * gate if gated else F.gelu(x)
    inputs = [x, *linear.parameters(), *([gate] if gated else [])]
    expected, found = linear(inner), gelu_linear(x, gate if gated else None, linear)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_conv_has_values_and_gradients_of_the_modules(gated: bool, has_bias: bool) -> None:
    x, gate = leaves((2, 5, 11), (5,))
    torch.manual_seed(2)
    conv = nn.Conv1d(5, 4, 3, stride=2, bias=has_bias).double()
    inner = F.gelu(x) * gate[:, None] if gated else F.gelu(x)
    inputs = [x, *conv.parameters(), *([gate] if gated else [])]
    expected, found = conv(inner), gelu_conv(x, gate if gated else None, conv)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def kept_bytes(function: object, *inputs: Tensor) -> int:
    """What a forward pass keeps for its backward pass, inputs and parameters left out."""
    known = {t.untyped_storage().data_ptr() for t in inputs}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = function()  # type: ignore[operator]
    del output
    return sum(found.values())


def test_nothing_of_the_inner_width_is_kept() -> None:
    x, gate, weight, bias = leaves((2, 3, 64), (64,), (4, 64), (4,))
    linear = as_linear(weight, bias)
    conv, audio = nn.Conv1d(64, 4, 3).double(), leaves((2, 64, 50))[0]
    ours = (x, gate, linear.weight, conv.weight, audio)
    assert kept_bytes(lambda: gelu_linear(x, gate, linear), *ours) == 0
    assert kept_bytes(lambda: linear(F.gelu(x) * gate), *ours) == 2 * x.numel() * 8  # what it replaces
    assert kept_bytes(lambda: gelu_conv(audio, None, conv), *ours) == 0


def test_frozen_weights_get_no_gradient_and_the_input_does() -> None:
    x, gate, weight, bias = leaves((2, 3, 5), (5,), (4, 5), (4,))
    linear = as_linear(weight, bias).requires_grad_(False)
    gelu_linear(x, gate.detach(), linear).sum().backward()
    assert x.grad is not None and linear.weight.grad is None and gate.grad is None


def test_autocast_gives_bfloat16_and_float32_gradients() -> None:
    torch.manual_seed(3)
    x, gate = torch.randn(2, 7, 32, requires_grad=True), torch.rand(32, requires_grad=True)
    linear, conv = nn.Linear(32, 8), nn.Conv1d(7, 4, 3)
    for function, module, inputs in (
        (lambda: gelu_linear(x, gate, linear), lambda: linear(F.gelu(x) * gate), (x, gate, *linear.parameters())),
        (lambda: gelu_conv(x, None, conv), lambda: conv(F.gelu(x)), (x, *conv.parameters())),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = function(), module()
        assert found.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        for ours, theirs in zip(
            torch.autograd.grad(found.float().square().sum(), inputs),
            torch.autograd.grad(expected.float().square().sum(), inputs),
            strict=True,
        ):
            assert ours.dtype == torch.float32
            assert (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_a_module_of_another_kind_or_with_a_hook_is_called() -> None:
    x = leaves((2, 3, 5))[0]
    calls: list[str] = []

    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append("masked")
            return super().forward(x)

    gelu_linear(x, None, Masked(5, 4).double())
    hooked = nn.Linear(5, 4).double()
    hooked.register_forward_hook(lambda *_: calls.append("hook"))
    gelu_linear(x, None, hooked)
    watched = nn.Linear(5, 4).double()
    watched.register_full_backward_hook(lambda *_: calls.append("backward hook"))
    gelu_linear(x, None, watched).sum().backward()
    assert calls == ["masked", "hook", "backward hook"]


def test_a_convolution_with_padding_keeps_it() -> None:
    x, conv = leaves((2, 5, 11))[0], nn.Conv1d(5, 4, 3, padding=1, dilation=2).double()
    torch.testing.assert_close(gelu_conv(x, None, conv), conv(F.gelu(x)))
