"""EWC: the closed form, its gradient, and files that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from s3distill.losses import check_fisher_fits, ewc_penalty


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 2, generator=generator, dtype=dtype),
        "b": torch.randn(4, generator=generator, dtype=dtype),
    }


def test_by_hand() -> None:
    parameters = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0]), "free": torch.tensor([100.0])}
    fisher = {"a": torch.tensor([0.5, 4.0]), "b": torch.tensor([2.0])}
    means = {"a": torch.tensor([0.0, 1.5]), "b": torch.tensor([5.0])}
    assert ewc_penalty(parameters, fisher, means).item() == 0.5 * 1 + 4 * 0.25 + 2 * 4
    assert ewc_penalty(means, fisher, means).item() == 0


def test_gradient() -> None:
    fisher, means = {k: v.square() for k, v in tensors(1).items()}, tensors(2)
    parameters = {k: v.requires_grad_() for k, v in tensors(0).items()}

    def penalty(a: Tensor, b: Tensor) -> Tensor:
        return ewc_penalty({"a": a, "b": b}, fisher, means)

    assert torch.autograd.gradcheck(penalty, tuple(parameters.values()))
    penalty(**parameters).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, 2 * fisher[name] * (parameter - means[name]).detach())


def test_half_precision_is_summed_in_float32() -> None:
    """300 squares of 300 are no number of float16."""
    parameters, ones = {"a": torch.full((300,), 300.0).half()}, {"a": torch.ones(300)}
    assert ewc_penalty(parameters, ones, {"a": torch.zeros(300)}).item() == 300**3


def test_files_that_do_not_fit() -> None:
    parameters = tensors(0)
    check_fisher_fits(tensors(1), parameters, "old.safetensors")
    with pytest.raises(
        ValueError, match=r"old.safetensors must be .* the model lacks c, d, e and 1 more and the file b"
    ):
        check_fisher_fits(
            {"a": parameters["a"], **dict.fromkeys("cdef", parameters["b"])}, parameters, "old.safetensors"
        )
    with pytest.raises(ValueError, match=r"b is \[5\] there and \[4\] in the model; .*ewc_head=false"):
        check_fisher_fits({**parameters, "b": torch.ones(5)}, parameters, "old.safetensors")
