"""OMP, IMP and PARP over a small network: schedules, exact counts, what stays removed and what grows back."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

from s3distill.encoder.config import ConvLayerConfig, EncoderConfig, uniform_layers
from s3distill.encoder.positional import WeightNormConv
from s3distill.masks.magnitude import METHODS, MagnitudePruning, PruningSchedule
from s3distill.masks.modules import Masked, MaskedLinear, MaskRule, mask_module
from s3distill.masks.network import MaskedNetwork
from s3distill.masks.options import MaskOptions
from s3distill.masks.selection import num_removed
from s3distill.masks.state import adopt_state

CONFIG = EncoderConfig(
    (ConvLayerConfig(8, 10, 5), ConvLayerConfig(8, 3, 2)),
    16,
    uniform_layers(2, 2, 8, 24),
    pos_conv_kernel=4,
    pos_conv_groups=2,
)
TARGET = 0.3
STEPS = {"omp": {}, "imp": {"prune_steps": 3, "prune_interval": 2}, "parp": {"prune_interval": 2}}
ALL_MASKED = {"no_prune_proj": False, "no_prune_extractor": False, "no_prune_pos": False}


def make_network(method: str, seed: int = 0, **options: Any) -> MaskedNetwork:
    torch.manual_seed(seed)
    network = MaskedNetwork(CONFIG, 5)
    values = {"prune_rate": TARGET, "prune_method": method, **STEPS[method], **ALL_MASKED, **options}
    network.add_masks(MaskOptions(**values))
    return network


@torch.no_grad()
def disturb(network: MaskedNetwork, seed: int, size: float = 0.3) -> None:
    """What an update does to the weights, as far as pruning is concerned; removed weights move too, as with momentum."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.masked_modules().values():
        for parameter in module.weight_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * parameter.abs().mean() * size)


def training_masks(network: MaskedNetwork) -> dict[str, Tensor]:
    assert network.training
    return {name: module.mask().clone() for name, module in network.masked_modules().items()}


def smallest_removed(weight: Tensor, alive: Tensor, density: float) -> Tensor:
    """The rule, one value at a time: dead ones first, then by |w|, the earlier of equal ones first."""
    values, living = weight.detach().flatten().tolist(), alive.flatten().tolist()
    order = sorted(range(len(values)), key=lambda i: (living[i], abs(values[i]) if living[i] else 0.0, i))
    mask = torch.ones(len(values), dtype=torch.bool)
    mask[order[: num_removed(density, len(values))]] = False
    return mask.view(weight.shape)


# --- schedules


def test_cubic_schedule_in_closed_form() -> None:
    schedule = PruningSchedule(num_steps=5, interval=40)
    sparsities = [1 - schedule.density(0.3, n) for n in (0, 40, 80, 120, 160)]
    assert sparsities == pytest.approx([0.7 * (1 - r**3) for r in (0.8, 0.6, 0.4, 0.2, 0.0)])
    assert sparsities[0] == pytest.approx(0.3416) and schedule.density(0.3, 160) == 0.3
    assert schedule.density(0.3, 79) == schedule.density(0.3, 40) and schedule.density(0.3, 10_000) == 0.3
    assert schedule.last_step_at == 160
    assert [n for n in range(400) if schedule.prunes_at(n)] == [0, 40, 80, 120, 160]
    again = dataclasses.replace(schedule, repeats=True)
    assert [n for n in range(400) if again.prunes_at(n)] == list(range(0, 400, 40))


@given(
    target=st.floats(0.01, 1.0),
    num_steps=st.integers(1, 30),
    interval=st.integers(1, 7),
    num_updates=st.integers(0, 300),
)
def test_density_falls_to_the_target_and_no_further(
    target: float, num_steps: int, interval: int, num_updates: int
) -> None:
    schedule = PruningSchedule(num_steps, interval)
    density = schedule.density(target, num_updates)
    assert target <= density + 1e-12 and density <= 1
    assert schedule.density(target, num_updates + 1) <= density + 1e-12
    assert (density == target) >= (num_updates >= schedule.last_step_at)
    # each step removes no more than the one before it
    removed = [1 - schedule.density(target, i * interval) for i in range(num_steps)]
    sizes = [b - a for a, b in zip([0.0, *removed], removed, strict=False)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(sizes))


def test_schedules_of_the_methods() -> None:
    assert PruningSchedule.of("omp", None, None) == PruningSchedule(1, 1, repeats=False)
    assert PruningSchedule.of("imp", 4, 10) == PruningSchedule(4, 10, repeats=False)
    assert PruningSchedule.of("parp", None, 50) == PruningSchedule(1, 50, repeats=True)
    assert PruningSchedule.of("parp", 4, 50) == PruningSchedule(4, 50, repeats=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_method": "lth"}, "`prune_method` must be one of s3_router, omp, imp, parp, but is 'lth'"),
        ({"prune_method": "imp"}, "`prune_steps` is None and `prune_interval` is None; pass e.g. model.prune_steps=5"),
        ({"prune_method": "imp", "prune_interval": 5, "prune_steps": 1}, "2 or more steps, but `prune_steps` is 1"),
        ({"prune_method": "parp"}, "`prune_interval` is not set; pass e.g. model.prune_interval=50"),
        ({"prune_method": "omp", "prune_steps": 3}, "`prune_steps` belongs to prune_method=imp and parp, but is 3"),
        ({"prune_interval": 3}, "`prune_interval` belongs to .* but is 3 with prune_method=s3_router; leave it out"),
        ({"prune_method": "parp", "prune_interval": 0}, "`prune_interval` must be at least 1, but is 0"),
        (
            {"prune_method": "omp", "fix_mask": True},
            "`fix_mask` is about learned scores, but is True with prune_method=omp",
        ),
        ({"prune_method": "omp", "ste_sigmoid": True}, "`ste_sigmoid` is about .* leave it at False"),
        ({"prune_method": "omp", "init_score": "weight_rank"}, "`init_score` is about .* leave it out"),
        ({"prune_method": "omp", "fix_mask_before": 1}, "`fix_mask_before` is about"),
        (
            {"prune_method": "omp", "load_mask_only": True},
            "`load_mask_only` is about .* or pass prune_method=s3_router",
        ),
        ({"prune_method": "omp", "load_mask_before": 2}, "`load_mask_before` is about"),
        (
            {"prune_method": "imp", "prune_interval": 5, "prune_steps": 2, "mask_pattern": "2:4", "prune_rate": 0.5},
            "2:4 removes half in the first step, but `prune_steps` is 2",
        ),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskOptions(**options)


@pytest.mark.parametrize("method", ["omp", "imp", "parp"])
def test_the_start_of_the_published_pruning_recipe_may_stand(method: str) -> None:
    options = {"init_score": "weight_magnitude_with_scale", "init_score_scale": 3.0}
    network, plain = make_network(method, **options), make_network(method)
    for one in (network, plain):
        one.prune(0)
    masks = training_masks(plain)
    assert all(torch.equal(masks[name], mask) for name, mask in training_masks(network).items())


def test_a_run_that_ends_before_the_target_is_refused() -> None:
    schedule = PruningSchedule(5, 40)
    schedule.check_length(161)
    schedule.check_length(0)
    with pytest.raises(
        ValueError, match=r"final sparsity at update 160, but optimization\.max_update is 160; lower one"
    ):
        schedule.check_length(160)


def test_nothing_to_prune_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to prune: no module is masked"):
        make_network("omp", prune_rate=1.0)


# --- what learns


@pytest.mark.parametrize("method", ["omp", "imp", "parp"])
def test_weights_learn_and_scores_do_not(method: str) -> None:
    network = make_network(method, no_prune_proj=True)
    assert not isinstance(network.proj, Masked), "the head is whole unless asked for"
    learns = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    assert all(learned != name.endswith(".scores") for name, learned in learns.items())
    network.prune(0)
    logits, _ = network(torch.randn(2, 400))
    logits.square().sum().backward()
    for name, module in network.masked_modules().items():
        (*_, weight) = module.weight_parameters()
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name
        assert module.scores.grad is None


@pytest.mark.parametrize("method", ["omp", "imp"])
def test_gradient_is_that_of_the_product(method: str) -> None:
    """dL/dW = dL/dW_eff * mask, in float64."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"fc": nn.Linear(6, 5).double()})
    module = mask_module(holder, "fc", MaskRule(0.4))
    pruning = MagnitudePruning(
        {"fc": module}, PruningSchedule.of(method, 3 if method == "imp" else None, 1 if method == "imp" else None)
    )
    pruning.start()
    pruning.prune(0)
    module.scores.requires_grad_(False)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    mask = module.mask()
    assert 0 < int(mask.sum()) < mask.numel()
    assert isinstance(module, MaskedLinear)
    reference = (module.weight.detach() * mask).requires_grad_()
    nn.functional.linear(x, reference, module.bias).sin().sum().backward()
    x_grad = x.grad
    x.grad = None
    module(x).sin().sum().backward()
    torch.testing.assert_close(module.weight.grad, reference.grad * mask)
    torch.testing.assert_close(x.grad, x_grad)


# --- omp


def test_omp_is_torchs_l1_pruning() -> None:
    network = make_network("omp")
    weights = {name: module.dense_weight().detach().clone() for name, module in network.masked_modules().items()}
    network.prune(0)
    for name, mask in training_masks(network).items():
        plain = nn.Linear(1, 1)
        plain.weight = nn.Parameter(weights[name].flatten(1))
        removed = num_removed(TARGET, weights[name].numel())
        l1_unstructured(plain, "weight", amount=removed)
        assert torch.equal(mask.flatten(1), plain.weight_mask.bool()), name
        assert int((~mask).sum()) == removed


def test_omp_never_changes_its_mind() -> None:
    network = make_network("omp")
    network.prune(0)
    masks = training_masks(network)
    for update in range(1, 6):
        disturb(network, update, size=3.0)
        network.eval()
        network.state_dict()
        network.train()
        network.prune(update)
        assert all(torch.equal(masks[name], mask) for name, mask in training_masks(network).items())


# --- imp


def test_imp_against_a_slow_loop() -> None:
    network = make_network("imp")
    alive = {n: torch.ones_like(m.dense_weight(), dtype=torch.bool) for n, m in network.masked_modules().items()}
    counts = []
    for update in range(9):
        network.prune(update)
        density = {0: 1 - 0.7 * 19 / 27, 2: 1 - 0.7 * 26 / 27, 4: TARGET}.get(update)  # 1 - (2/3)^3, 1 - (1/3)^3, 1
        for name, module in network.masked_modules().items():
            if density is not None:
                alive[name] = smallest_removed(module.dense_weight(), alive[name], density)
            assert torch.equal(module.mask(), alive[name]), f"{name} at update {update}"
            torch.testing.assert_close(module.masked_weight(), module.dense_weight() * alive[name], rtol=0, atol=0)
        counts.append(sum(int(mask.sum()) for mask in alive.values()))
        disturb(network, update, size=2.0)
    assert counts[0] == counts[1] > counts[2] == counts[3] > counts[4] == counts[8]


def test_imp_removes_by_the_weights_of_that_time() -> None:
    network = make_network("imp")
    module = network.get_submodule("w2v_model.encoder.layers.0.fc1")
    assert isinstance(module, MaskedLinear)
    network.prune(0)
    survivor = module.mask().nonzero()[0]
    removed = (~module.mask()).nonzero()[0]
    with torch.no_grad():
        module.weight[tuple(survivor)] = 0.0
        module.weight[tuple(removed)] = 100.0
    network.prune(1)
    assert module.mask()[tuple(survivor)], "a weight of 0 is not removed before the next step"
    network.eval()
    network.train()
    assert module.mask()[tuple(survivor)], "nor through an evaluation"
    network.prune(2)
    assert not module.mask()[tuple(survivor)] and not module.mask()[tuple(removed)]


# --- parp


def test_parp_trains_dense_and_is_evaluated_sparse() -> None:
    network = make_network("parp")
    network.prune(0)
    for name, module in network.masked_modules().items():
        weight = module.dense_weight()
        assert int((weight == 0).sum()) == num_removed(TARGET, weight.numel()), name
        assert torch.equal(module.masked_weight(), weight)
    zeroed = {name: module.dense_weight() == 0 for name, module in network.masked_modules().items()}
    disturb(network, 1, size=3.0)
    network.prune(1)
    x = torch.randn(1, 400)
    dense = network(x)[0]
    network.eval()
    for name, module in network.masked_modules().items():
        weight = module.dense_weight()
        expected = smallest_removed(weight, torch.ones_like(weight, dtype=torch.bool), TARGET)
        assert torch.equal(module.mask(), expected), name
        assert (expected & zeroed[name]).any(), "the mask is that of the weights now, not of the last pruning"
        assert torch.equal(module.masked_weight(), weight * expected)
    assert (network(x)[0] - dense).abs().max() > 1e-3, "the mask must show in evaluation"
    network.train()
    assert torch.equal(network(x)[0], dense), "and be gone in training"


def test_parp_lets_weights_grow_back() -> None:
    network = make_network("parp")
    module = network.get_submodule("w2v_model.encoder.layers.1.fc2")
    assert isinstance(module, MaskedLinear)
    network.prune(0)
    zeroed = tuple((module.weight == 0).nonzero()[0])
    logits, _ = network(torch.randn(1, 400))
    logits.square().sum().backward()
    assert module.weight.grad is not None and module.weight.grad[zeroed] != 0, "a zeroed weight has a gradient"
    with torch.no_grad():
        module.weight[zeroed] = 10.0
    network.prune(1)
    assert module.weight[zeroed] == 10.0, "nothing is zeroed between events"
    network.prune(2)
    assert module.weight[zeroed] == 10.0
    assert int((module.weight == 0).sum()) == num_removed(TARGET, module.weight.numel())
    network.eval()
    assert module.mask()[zeroed]


def test_progressive_parp_zeroes_more_with_each_step() -> None:
    network = make_network("parp", prune_steps=3)
    weight = network.get_submodule("w2v_model.encoder.layers.0.fc1").weight
    assert isinstance(weight, Tensor)
    found = []
    for update in range(0, 10, 2):
        network.prune(update)
        found.append(int((weight == 0).sum()))
        disturb(network, update)
    steps = [1 - 0.7 * 19 / 27, 1 - 0.7 * 26 / 27, TARGET, TARGET, TARGET]
    assert found == [num_removed(density, weight.numel()) for density in steps]


def test_parp_zeroes_the_effective_weight_of_the_positional_convolution() -> None:
    torch.manual_seed(0)
    holder = nn.ModuleDict({"conv": WeightNormConv(8, 4, 2)})
    with torch.no_grad():
        holder["conv"].weight_g[..., 2] *= 1e-3  # nothing of this position is kept
    module = mask_module(holder, "conv", MaskRule(0.4))
    pruning = MagnitudePruning({"conv": module}, PruningSchedule(1, 1, repeats=True), grows_back=True)
    pruning.start()
    before = module.dense_weight().detach().clone()
    parameters = {p: p.detach().clone() for p in module.weight_parameters()}
    pruning.prune(0)
    mask = smallest_removed(before, torch.ones_like(before, dtype=torch.bool), 0.4)
    assert not mask[..., 2].any() and mask[..., 0].any()
    torch.testing.assert_close(module.dense_weight(), before * mask)
    assert set(pruning.factors) == set(parameters)
    for parameter, value in parameters.items():
        assert torch.equal(parameter, value * pruning.factors[parameter])
    module.dense_weight().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in parameters if p.grad is not None)
    # a position that was closed can open again
    assert parameters and module.weight_parameters()[0].grad[..., 2].abs() > 0  # type: ignore[index]


def test_factors_are_there_for_one_update() -> None:
    network = make_network("parp")
    assert network.magnitude is not None
    network.prune(0)
    factors = network.magnitude.factors
    weight = network.get_submodule("w2v_model.encoder.layers.0.fc1").weight
    assert torch.equal(factors[weight], weight != 0)  # type: ignore[index]
    network.prune(0)
    assert network.magnitude.factors is factors, "the second micro-batch of an update"
    network.prune(1)
    assert network.magnitude.factors == {}
    other = make_network("imp")
    other.prune(0)
    assert other.magnitude is not None and other.magnitude.factors == {}, "masks do not touch the weights"


# --- all of them


@pytest.mark.parametrize("method", ["omp", "imp", "parp"])
def test_a_second_micro_batch_changes_nothing(method: str) -> None:
    network = make_network(method)
    network.prune(0)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    disturbed = next(iter(network.masked_modules().values()))
    with torch.no_grad():
        disturbed.weight_parameters()[0].mul_(2)
    masks = training_masks(network)
    network.prune(0)
    assert all(torch.equal(masks[name], mask) for name, mask in training_masks(network).items())
    assert any(not torch.equal(state[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("method", ["omp", "imp", "parp"])
def test_evaluation_and_checkpoints_show_the_target_at_any_time(method: str) -> None:
    network = make_network(method)
    x = torch.randn(1, 400)
    for update in range(6):
        network.prune(update)
        disturb(network, update)
        masks, in_training = training_masks(network), network(x)[0]
        state = {name: value.clone() for name, value in network.state_dict().items()}  # saved while it trains

        network.eval()
        evaluated = network(x)[0]
        for name, module in network.masked_modules().items():
            assert int((~module.mask()).sum()) == num_removed(TARGET, module.mask().numel()), name
            if method != "parp":
                assert not (module.mask() & ~masks[name]).any(), "evaluation keeps nothing that was removed"

        # what is in the file is read without knowing how it was made
        torch.manual_seed(9)
        loaded = MaskedNetwork(CONFIG, 5)
        loaded.add_masks(MaskOptions(prune_rate=TARGET, **ALL_MASKED))
        adopt_state(loaded.eval(), state)
        torch.testing.assert_close(loaded(x)[0], evaluated, rtol=0, atol=0)
        assert loaded.bake() == len(masks) and not any("scores" in name for name in loaded.state_dict())
        torch.testing.assert_close(loaded(x)[0], evaluated)

        network.train()
        assert all(torch.equal(masks[name], mask) for name, mask in training_masks(network).items())
        assert torch.equal(network(x)[0], in_training)
    network.bake()  # while it trains
    torch.testing.assert_close(network(x)[0], evaluated)


@pytest.mark.parametrize("saved_at", range(1, 7))
@pytest.mark.parametrize("method", ["omp", "imp", "parp", "parp-p"])
def test_a_resumed_run_is_the_same_run(method: str, saved_at: int) -> None:
    options = {"prune_steps": 3} if method == "parp-p" else {}

    def train(network: MaskedNetwork, updates: range, saves: bool) -> dict[str, Tensor]:
        for update in updates:
            if saves:
                network.eval()
                network.state_dict()
                network.train()
            network.prune(update)
            effective = {n: m.masked_weight().detach().clone() for n, m in network.masked_modules().items()}
            disturb(network, update)
        return {**effective, **{name: value.clone() for name, value in network.state_dict().items()}}

    method = method.removesuffix("-p")
    whole = train(make_network(method, **options), range(9), saves=False)
    first = make_network(method, **options)
    state = train(first, range(saved_at), saves=True)
    resumed = make_network(method, seed=7, **options)
    adopt_state(resumed, {name: value for name, value in state.items() if name in first.state_dict()})
    end = train(resumed, range(saved_at, 9), saves=True)
    assert all(torch.equal(end[name], value) for name, value in whole.items())


@settings(max_examples=25, deadline=None)
@given(
    method=st.sampled_from(METHODS[1:]),
    density=st.floats(0.02, 0.98),
    pattern=st.sampled_from(["unstructured", "rows", "columns"]),
    seed=st.integers(0, 99),
)
def test_counts_are_exact(method: str, density: float, pattern: str, seed: int) -> None:
    network = make_network(method, seed, prune_rate=density, mask_pattern=pattern, no_prune_pos=True)
    for update in range(5):
        network.prune(update)
        disturb(network, update + seed)
    network.eval()
    for name, module in network.masked_modules().items():
        assert int((module.scores > 0).sum()) >= module.scores.numel() - num_removed(density, module.scores.numel())
        per_score = module.mask().numel() // module.scores.numel()
        assert int((~module.mask()).sum()) == per_score * num_removed(density, module.scores.numel()), name


@pytest.mark.parametrize("method", ["omp", "parp"])
def test_two_of_four(method: str) -> None:
    network = make_network(method, prune_rate=0.5, mask_pattern="2:4", no_prune_extractor=True, no_prune_pos=True)
    network.prune(0)
    for module in network.masked_modules().values():
        kept = (module.masked_weight() != 0).view(len(module.dense_weight()), -1, 4).sum(-1)
        assert (kept == 2).all()
    disturb(network, 0)
    x = torch.randn(1, 400)
    in_training = network(x)[0]
    if method == "parp":
        assert all(torch.equal(m.masked_weight(), m.dense_weight()) for m in network.masked_modules().values())
    network.eval()
    assert ((network.proj.masked_weight() != 0).view(5, -1, 4).sum(-1) == 2).all()  # type: ignore[operator]
    network.train()
    assert torch.equal(network(x)[0], in_training)


def test_densities_of_their_own_fall_on_one_schedule() -> None:
    network = make_network("imp", layerwise_prune_rate=(0.2, 0.6))
    for update, share in ((0, 19 / 27), (2, 26 / 27), (4, 1.0)):
        network.prune(update)
        for layer, target in ((0, 0.2), (1, 0.6)):
            mask = network.get_submodule(f"w2v_model.encoder.layers.{layer}.fc1").mask()  # type: ignore[operator]
            assert int((~mask).sum()) == num_removed(1 - (1 - target) * share, mask.numel())


def test_scores_of_a_dense_start_are_taken_after_its_weights_came() -> None:
    dense = make_network("omp", seed=5)
    state = {name: value.clone() for name, value in dense.state_dict().items() if not name.endswith(".scores")}
    network = make_network("omp", seed=1)
    adopt_state(network, state)
    network.prune(0)
    dense.prune(0)
    masks = training_masks(dense)
    assert all(torch.equal(masks[name], mask) for name, mask in training_masks(network).items())


def test_weights_that_are_not_numbers() -> None:
    network = make_network("omp")
    with torch.no_grad():
        network.proj.weight[0] = torch.nan  # type: ignore[index]
    with pytest.raises(RuntimeError, match="NaN: the training diverged"):
        network.prune(0)


@pytest.mark.parametrize("cast", [lambda n: n.half(), lambda n: n.bfloat16()], ids=["float16", "bfloat16"])
def test_half_precision_weights_have_float32_scores(cast: Callable[[MaskedNetwork], MaskedNetwork]) -> None:
    network = cast(make_network("parp"))
    network.prune(0)
    for module in network.masked_modules().values():
        assert module.scores.dtype == torch.float32
        if len(module.weight_parameters()) == 1:
            removed = num_removed(TARGET, module.scores.numel())
            assert int((module.weight_parameters()[0] == 0).sum()) == removed
    network.eval()
    assert all(m.mask().float().mean() == pytest.approx(TARGET, abs=0.02) for m in network.masked_modules().values())
