"""`adamw_groups`: groups keep their learning rates, and a resumed run takes its options from the command line."""

import pytest
import torch

pytest.importorskip("fairseq")

from s3distill.optim.adamw_groups import AdamWGroups, AdamWGroupsConfig


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    main, gate, multiplier = (torch.nn.Parameter(torch.randn(3)) for _ in range(3))
    gate.param_group, multiplier.param_group = "gate", "multiplier"
    return [main, gate, multiplier]


def build(params: list[torch.nn.Parameter], **options: object) -> AdamWGroups:
    values = {"lr": [0.001], "gate_lr": 0.02, "multiplier_lr": 0.05, "weight_decay": 0.1, **options}
    return AdamWGroups(AdamWGroupsConfig(**values), params)


def step(optimizer: AdamWGroups, params: list[torch.nn.Parameter]) -> None:
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_one_schedule_and_a_peak_for_each_group() -> None:
    params = parameters()
    optimizer = build(params)
    optimizer.set_lr(0.0005)  # half of the peak
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0005, 0.01, 0.025])
    assert optimizer.get_lr() == pytest.approx(0.0005)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]


def test_a_first_step_moves_each_group_by_its_rate() -> None:
    """Adam's first step is lr * sign(gradient), up to epsilon."""
    params = parameters()
    before = [p.detach().clone() for p in params]
    step(build(params, weight_decay=0.0), params)
    for parameter, old, rate in zip(params, before, (0.001, 0.02, 0.05), strict=True):
        torch.testing.assert_close(old - parameter, torch.full((3,), rate), rtol=1e-4, atol=1e-6)


def test_resuming_takes_moments_from_the_file_and_options_from_the_command_line() -> None:
    params = parameters()
    first = build(params)
    step(first, params)
    saved = first.state_dict()
    second = build(params, gate_lr=0.002, weight_decay=0.3, adam_betas=[0.5, 0.6], adam_eps=1e-3)
    second.load_state_dict(saved, {})
    second.set_lr(0.001)
    assert [group["lr"] for group in second.param_groups] == pytest.approx([0.001, 0.002, 0.05])
    assert second.param_groups[0]["weight_decay"] == 0.3
    assert all(tuple(group["betas"]) == (0.5, 0.6) and group["eps"] == 1e-3 for group in second.param_groups)
    moments = second.optimizer.state[params[1]]["exp_avg"]
    torch.testing.assert_close(moments, torch.full((3,), 0.1))


def test_clipping_scales_all_groups_together() -> None:
    params = parameters()
    optimizer = build(params)
    for parameter in params:
        parameter.grad = torch.full_like(parameter, 2.0)
    norm = optimizer.clip_grad_norm(3.0)
    assert norm.item() == pytest.approx(6.0)  # sqrt(9 * 4)
    assert torch.cat([p.grad for p in params if p.grad is not None]).norm().item() == pytest.approx(3.0, rel=1e-4)
    assert optimizer.clip_grad_norm(0.0).item() == pytest.approx(3.0, rel=1e-4)  # 0 only measures


def test_a_learning_rate_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`optimization.lr` must be positive, but is \[0.0\]"):
        build(parameters(), lr=[0.0])
