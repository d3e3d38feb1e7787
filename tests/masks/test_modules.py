"""Masked modules: exact gradients, masks that take part and are computed once per update, and baking them in."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3distill.encoder.config import EncoderConfig, parse_conv_layers, uniform_layers
from s3distill.encoder.positional import WeightNormConv
from s3distill.encoder.training_config import TrainingConfig
from s3distill.masks.modules import Masked, MaskRule, bake, kept_share, mask_module, masked_modules
from s3distill.masks.network import MaskedNetwork
from s3distill.masks.options import ATTENTION_LINEARS, FFN_LINEARS, MaskOptions
from s3distill.masks.selection import PATTERNS, scores_shape, select

CONFIG = EncoderConfig(
    conv_layers=parse_conv_layers("[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2"),
    embed_dim=32,
    layers=uniform_layers(2, 4, 8, 48),
    pos_conv_kernel=16,
    pos_conv_groups=4,
)
KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 8),
    "linear without bias": lambda: nn.Linear(12, 8, bias=False),
    "conv": lambda: nn.Conv1d(4, 8, 3, stride=2),
    "grouped conv": lambda: nn.Conv1d(8, 8, 5, padding=2, groups=2, bias=False),
    "weight norm": lambda: WeightNormConv(8, 6, 2),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def rule(density: float = 0.6, **options: Any) -> MaskRule:
    return MaskRule(density, **options)


def masked(kind: str, mask_rule: MaskRule | None = None, seed: int = 0) -> Masked:
    """A masked module with random weights and scores."""
    torch.manual_seed(seed)
    parent = nn.ModuleDict({"inner": KINDS[kind]()})
    module = mask_module(parent, "inner", mask_rule or rule())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return module


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (3, 12) if kind.startswith("linear") else (2, 4 if kind == "conv" else 8, 11)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)


def in_float64(module: Masked) -> Masked:
    """The scores too, which a cast of the model leaves alone."""
    module.double()
    module.scores = nn.Parameter(module.scores.detach().double())
    return module


def network(seed: int = 0, training: TrainingConfig | None = None, **options: Any) -> MaskedNetwork:
    torch.manual_seed(seed)
    made = MaskedNetwork(CONFIG, 7, training)
    made.add_masks(MaskOptions(**options))
    return made


WAVEFORM = torch.randn(2, 6000, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- gradients


def reference_weight(scores: Tensor, weight: Tensor, mask_rule: MaskRule) -> Tensor:
    """W * mask, whose derivative autograd takes from |s| (or its sigmoid) in place of the mask."""
    magnitude = torch.where(scores < 0, -scores, scores)  # slope +1 at 0
    soft = torch.sigmoid(magnitude) if mask_rule.ste_sigmoid else magnitude
    hard = select(scores, mask_rule.density, mask_rule.pattern).to(weight.dtype)
    return weight * (hard + (soft - soft.detach()))


@each_kind
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("co_train", [False, True])
def test_gradients_are_those_of_the_reference(kind: str, pattern: str, sigmoid: bool, co_train: bool) -> None:
    """dL/ds = dL/dW_eff * W * sign(s) [* sigmoid'(|s|)], summed where rows or columns share a score; dL/dW = dL/dW_eff * mask."""
    module = in_float64(masked(kind, rule(pattern=pattern, ste_sigmoid=sigmoid)))
    for parameter in module.weight_parameters():
        parameter.requires_grad_(co_train)
    with torch.no_grad():
        module.scores.view(-1)[1] = 0

    x = inputs(kind, torch.float64).requires_grad_()
    module(x).square().sum().backward()
    found = {name: p.grad for name, p in module.named_parameters()} | {"x": x.grad}

    twin = in_float64(masked(kind, module.rule))  # the same forward, but with autograd's own derivative
    twin.load_state_dict(module.state_dict())
    twin.masked_weight = lambda: reference_weight(twin.scores, twin.dense_weight(), module.rule)  # type: ignore[method-assign]
    y = x.detach().clone().requires_grad_()
    twin(y).square().sum().backward()
    expected = {name: p.grad for name, p in twin.named_parameters()} | {"x": y.grad}

    weights = {"weight", "weight_g", "weight_v"}
    assert found["scores"].shape == scores_shape(pattern, module.dense_weight().shape)
    assert bool(found["scores"].any()) and bool(found["x"].any())
    for name, gradient in expected.items():
        if name in weights and not co_train:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


def test_the_identity_in_so_many_words() -> None:
    module = in_float64(masked("linear"))
    module.weight.requires_grad_(False)
    x, upstream = inputs("linear", torch.float64), torch.randn(3, 8, dtype=torch.float64)
    (module(x) * upstream).sum().backward()
    grad_weight = upstream.T @ x  # dL/dW_eff, [8, 12]
    torch.testing.assert_close(
        module.scores.grad, grad_weight * module.weight * module.scores.sign(), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("method", ["zero", "weight_magnitude", "negative_weight_magnitude"])
def test_scores_of_zero_get_a_gradient(method: str) -> None:
    """torch.abs has slope 0 there: scores that start at 0 would stay there for ever."""
    module = masked("linear")
    module.reset_scores(method)
    at_zero = module.scores == 0
    assert bool(at_zero.any())
    module(inputs("linear")).square().sum().backward()
    assert bool((module.scores.grad[at_zero] != 0).all())


def test_removed_connections_get_a_gradient_too() -> None:
    """Otherwise a connection that is gone could never come back."""
    module = masked("linear", rule(0.3))
    module(inputs("linear")).square().sum().backward()
    assert bool((module.scores.grad[~module.mask()] != 0).all())


def test_a_step_brings_a_connection_back() -> None:
    module = masked("linear", rule(0.5))
    with torch.no_grad():  # two connections at the border, of which the wrong one is kept
        module.scores.copy_(torch.linspace(1, 2, 96).view(8, 12))
    before = module.mask().clone()
    optimizer = torch.optim.SGD([module.scores], lr=0.5)
    x = inputs("linear")
    target = F.linear(x, module.weight * (torch.arange(96).view(8, 12) < 48), module.bias).detach()
    first = F.mse_loss(module(x), target).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.mse_loss(module(x), target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    assert int((module.mask() & ~before).sum()) > 5


def test_gradients_of_several_micro_batches_add_up() -> None:
    module, x = in_float64(masked("linear")), inputs("linear", torch.float64)
    module(x).square().sum().backward()
    whole = module.scores.grad.clone()
    module.scores.grad = None
    for row in x:
        module(row[None]).square().sum().backward()
    torch.testing.assert_close(module.scores.grad, whole, rtol=1e-12, atol=1e-12)
    assert module.num_refreshes == 1


def test_one_module_called_twice_in_a_forward() -> None:
    module, x = in_float64(masked("linear")), inputs("linear", torch.float64)
    (module(x).sum() + 3 * module(2 * x).sum()).backward()
    twice = module.scores.grad.clone()
    module.scores.grad = None
    (7 * module(x)).sum().backward()
    torch.testing.assert_close(module.scores.grad, twice, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- effect


@each_kind
def test_output_is_that_of_the_masked_weight(kind: str) -> None:
    module = masked(kind)
    x = inputs(kind)
    plain = bake_alone(module)
    assert 0 < int((module.masked_weight() == 0).sum()) == int((~module.mask()).sum())
    torch.testing.assert_close(module(x), plain(x), rtol=1e-6, atol=1e-6)
    module.rule = rule(1.0)
    assert not torch.allclose(module(x), plain(x)), "without the mask the output is another"


def bake_alone(module: Masked) -> nn.Module:
    """The plain module that a masked one stands for; the masked one stays."""
    holder = nn.ModuleDict({"inner": copy.deepcopy(module)})
    assert bake(holder) == 1
    return holder["inner"]


def test_removing_everything_leaves_the_bias() -> None:
    module = masked("linear", rule(1e-9))
    assert int(module.mask().sum()) == 1  # the count is rounded down
    module.rule = rule(1e-18)
    torch.testing.assert_close(module(inputs("linear")), module.bias.expand(3, 8))


@pytest.mark.parametrize("name", [*ATTENTION_LINEARS, *FFN_LINEARS])
def test_scores_of_every_linear_change_the_output(name: str) -> None:
    """fairseq's attention hands its weights to a fused kernel, and a masked projection would be bypassed."""
    made = network(prune_rate=0.5).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        before = made(WAVEFORM)[0]
        made.masked_modules()[f"w2v_model.encoder.layers.0.{name}"].scores.mul_(-1)
        torch.testing.assert_close(made(WAVEFORM)[0], before, rtol=0, atol=0)  # the signs do not matter
        made.masked_modules()[f"w2v_model.encoder.layers.0.{name}"].scores.copy_(
            torch.randn_like(made.masked_modules()[f"w2v_model.encoder.layers.0.{name}"].scores)
        )
        assert not torch.allclose(made(WAVEFORM)[0], before, atol=1e-6)


def test_every_score_of_the_network_learns() -> None:
    made = network(
        prune_rate=0.5,
        no_prune_extractor=False,
        no_prune_pos=False,
        no_prune_proj=False,
        no_prune_post_extract_proj=False,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    made(WAVEFORM)[0].square().sum().backward()
    modules = made.masked_modules()
    assert len(modules) == 7 + 1 + 1 + 2 * 6 + 1
    for name, module in modules.items():
        assert module.scores.grad is not None, name
        share = float((module.scores.grad != 0).float().mean())
        # k_proj: a bias of all keys cancels in the softmax, but no weight does; GELU may leave a few exact zeros
        assert share > 0.95, f"{name}: {share}"
        assert all(p.grad is None for p in module.weight_parameters())


# ---------------------------------------------------------------- once per update


def fairseq_adam(parameters: Any) -> torch.optim.Optimizer:
    """Writes through ``param.data``, so that the parameter's version stays what it was."""
    from fairseq.optim.adam import Adam

    return Adam(parameters, lr=0.1)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adam, foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "fairseq's adam": fairseq_adam,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("co_train", [False, True])
def test_one_refresh_per_update(name: str, co_train: bool) -> None:
    module, x = masked("linear", rule(0.5)), inputs("linear")
    module.weight.requires_grad_(co_train)
    optimizer = OPTIMIZERS[name]([p for p in module.parameters() if p.requires_grad])
    for update in range(4):
        optimizer.zero_grad()
        for _ in range(3):  # update_freq
            module(x).square().sum().backward()
        with torch.no_grad():
            module(x)
        assert module.num_refreshes == update + 1
        expected = module.weight * select(module.scores, 0.5)
        assert torch.equal(module.masked_weight(), expected), "an update was not seen"
        optimizer.step()
    module(x)
    assert torch.equal(module.masked_weight(), module.weight * select(module.scores, 0.5))


def test_fairseqs_adam_leaves_the_version_alone() -> None:
    """What the count of steps is for; where this fails, the count is no longer needed."""
    module = masked("linear")
    optimizer = fairseq_adam([module.scores])
    module(inputs("linear")).sum().backward()
    version, before = module.scores._version, module.scores.detach().clone()
    optimizer.step()
    assert module.scores._version == version and not torch.equal(module.scores, before)


def test_an_optimizer_of_something_else_costs_no_refresh_of_frozen_masks() -> None:
    module, other = masked("linear"), nn.Linear(2, 2)
    module.requires_grad_(False)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(3):
        module(inputs("linear"))
        other(torch.ones(2)).sum().backward()
        optimizer.step()
    assert module.num_refreshes == 1


def test_evaluation_computes_no_mask() -> None:
    made = network(prune_rate=0.5).eval()
    with torch.no_grad():
        for _ in range(3):
            made(WAVEFORM)
    made.train()
    made(WAVEFORM)
    assert {m.num_refreshes for m in made.masked_modules().values()} == {1}


def test_recomputed_layers_compute_no_mask_and_give_the_same_gradients() -> None:
    gradients = {}
    for checkpointed in (False, True):
        made = network(training=TrainingConfig(checkpoint_activations=checkpointed), prune_rate=0.5).train()
        optimizer = fairseq_adam([p for p in made.parameters() if p.requires_grad])
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(2):
                made(WAVEFORM)[0].square().sum().backward()
            optimizer.step()
        assert {m.num_refreshes for m in made.masked_modules().values()} == {2}
        gradients[checkpointed] = {n: m.scores.grad for n, m in made.masked_modules().items()}
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, rtol=1e-5, atol=1e-8)


def change_by_load_state_dict(module: Masked) -> None:
    module.load_state_dict({n: torch.randn_like(p) for n, p in module.state_dict().items()})


def change_by_data(module: Masked) -> None:
    module.scores.data = torch.randn_like(module.scores)


def change_in_place(module: Masked) -> None:
    with torch.no_grad():
        module.scores.normal_()


def change_in_inference_mode(module: Masked) -> None:
    with torch.inference_mode():
        module.scores.normal_()


def change_the_parameter(module: Masked) -> None:
    module.scores = nn.Parameter(torch.randn_like(module.scores))


def change_by_vector(module: Masked) -> None:
    vector = torch.randn(module.scores.numel())
    nn.utils.vector_to_parameters(vector, [module.scores])


def change_the_weight(module: Masked) -> None:
    with torch.no_grad():
        module.weight_parameters()[0].normal_()


def change_the_rule(module: Masked) -> None:
    module.rule = dataclasses.replace(module.rule, density=0.2)


def change_the_weight_by_load_state_dict_with_assign(module: Masked) -> None:
    module.load_state_dict({n: torch.randn_like(p) for n, p in module.state_dict().items()}, assign=True)


CHANGES = [value for name, value in list(globals().items()) if name.startswith("change_")]


@each_kind
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.removeprefix("change_"))
@pytest.mark.parametrize("frozen", [False, True])
def test_every_change_is_seen(kind: str, change: Callable[[Masked], None], frozen: bool) -> None:
    module = masked(kind)
    module.requires_grad_(not frozen)
    before = module.masked_weight().detach().clone()
    change(module)
    expected = module.dense_weight() * select(module.scores, module.rule.density)
    assert not torch.equal(before, expected)
    torch.testing.assert_close(module.masked_weight(), expected, rtol=0, atol=0)


def test_freezing_and_thawing_are_seen() -> None:
    module, x = masked("linear"), inputs("linear")
    module.requires_grad_(False)
    assert not module(x).requires_grad
    module.scores.requires_grad_(True)
    module(x).square().sum().backward()
    assert module.scores.grad is not None and module.weight.grad is None
    module.weight.requires_grad_(True)
    module(x).square().sum().backward()
    assert module.weight.grad is not None and bool((module.weight.grad[~module.mask()] == 0).all())


@each_kind
@pytest.mark.parametrize("needed", ["scores", "inputs", "weights"])
def test_a_graph_from_before_an_update_is_never_silently_wrong(kind: str, needed: str) -> None:
    """Its backward pass gives the gradients of its own masks, or refuses."""

    def prepared() -> tuple[Masked, Tensor, Tensor]:
        module, x = masked(kind), inputs(kind)
        module.requires_grad_(needed == "weights")
        module.scores.requires_grad_(needed == "scores")
        x.requires_grad_(needed == "inputs")
        return module, x, module(x)

    module, x, out = prepared()
    out.sum().backward()
    expected = [t.grad for t in (x, *module.parameters())]
    module, x, out = prepared()
    module.scores.data.normal_()  # as fairseq's optimizers write
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0).step()
    module(x)
    assert module.num_refreshes == 2 or needed == "inputs"  # nothing of the module learns: no optimizer is its own
    try:
        out.sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        for found, gradient in zip((x, *module.parameters()), expected, strict=True):
            assert (found.grad is None) == (gradient is None)
            if gradient is not None:
                torch.testing.assert_close(found.grad, gradient)


def test_what_evaluation_gave_stays() -> None:
    made = network(prune_rate=0.5).eval()
    with torch.no_grad():
        first = made(WAVEFORM)[0]
        kept = first.clone()
        for module in made.masked_modules().values():
            module.scores.normal_()
        assert not torch.equal(made(WAVEFORM)[0], first)
    assert torch.equal(first, kept)


def test_inference_mode_first_and_training_then() -> None:
    """What inference mode computes must not be what a later backward pass needs."""
    made = network(prune_rate=0.5)
    with torch.inference_mode():
        made(WAVEFORM)
    made(WAVEFORM)[0].square().sum().backward()
    assert all(m.scores.grad is not None for m in made.masked_modules().values())
    assert {m.num_refreshes for m in made.masked_modules().values()} == {1}


def test_a_network_that_was_built_in_inference_mode() -> None:
    """Its parameters have no version that could be counted."""
    with torch.inference_mode():
        made = network(prune_rate=0.5).eval()
        first = made(WAVEFORM)[0]
        twice = made(WAVEFORM)[0]
        assert torch.equal(first, twice)
        made.masked_modules()["w2v_model.encoder.layers.0.fc1"].scores.normal_()
        assert not torch.equal(made(WAVEFORM)[0], first)
    assert torch.equal(network(prune_rate=0.5).eval()(WAVEFORM)[0], first)


# ---------------------------------------------------------------- casts and copies


@each_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_stay_float32(kind: str, dtype: torch.dtype) -> None:
    module = masked(kind)
    scores, mask = module.scores.detach().clone(), module.mask()
    module(inputs(kind))
    module.to(dtype)
    assert {n: p.dtype for n, p in module.named_parameters() if n != "scores"}.items() <= {
        (n, dtype) for n, _ in module.named_parameters()
    }
    assert module.scores.dtype == torch.float32 and torch.equal(module.scores, scores)
    assert torch.equal(module.mask(), mask)
    x = inputs(kind, dtype)
    output = module(x)
    assert output.dtype == dtype and output.isfinite().all() and module.masked_weight().dtype == dtype
    output.float().square().sum().backward()
    assert module.scores.grad.dtype == torch.float32 and module.scores.grad.isfinite().all()
    module.float()
    assert module.masked_weight().dtype == torch.float32 and torch.equal(module.scores, scores)


def test_casts_by_every_name() -> None:
    for cast in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16), lambda m: m.type(torch.float16)):
        module = masked("linear")
        parameter = module.scores
        cast(module)
        assert module.scores.dtype == torch.float32 and module.weight.dtype != torch.float32
        assert module.scores is parameter, "an optimizer holds it"


def test_a_cast_of_the_network_around_it() -> None:
    made = network(prune_rate=0.5, no_prune_pos=False, no_prune_extractor=False, no_prune_proj=False).half()
    assert {p.dtype for n, p in made.named_parameters() if n.endswith(".scores")} == {torch.float32}
    assert {p.dtype for n, p in made.named_parameters() if not n.endswith(".scores")} == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_is_finite(dtype: torch.dtype) -> None:
    options: dict[str, Any] = dict(prune_rate=0.5, no_prune_pos=False, no_prune_extractor=False, no_prune_proj=False)
    expected = network(**options).eval()(WAVEFORM)[0]
    made = network(**options).eval().to(dtype)
    logits = made(WAVEFORM.to(dtype))[0]
    assert logits.dtype == dtype and logits.isfinite().all()
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.1)
    logits.float().square().sum().backward()
    assert all(m.scores.grad.isfinite().all() for m in made.masked_modules().values())


def test_moving_to_a_device_sees_the_same_scores() -> None:
    module = masked("linear")
    module(inputs("linear"))
    module.to("cpu")
    assert torch.equal(module.masked_weight(), module.weight * module.mask())
    assert module.to("meta").scores.shape == (8, 12)


@each_kind
def test_a_deep_copy_is_independent(kind: str) -> None:
    module, x = masked(kind), inputs(kind)
    expected = module(x).detach()
    twin = copy.deepcopy(module)
    with torch.no_grad():
        module.scores.normal_()
    assert not torch.equal(module(x), expected)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    with torch.no_grad():
        twin.scores.normal_()
    assert not torch.equal(twin(x), expected)


@each_kind
def test_pickle_and_torch_save(kind: str) -> None:
    module, x = masked(kind), inputs(kind)
    expected = module(x).detach()
    twins = [pickle.loads(pickle.dumps(module))]
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    twins.append(torch.load(buffer, weights_only=False))
    for twin in twins:
        torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
        twin(x).square().sum().backward()
        assert twin.scores.grad is not None
        with torch.no_grad():
            twin.scores.normal_()
        assert not torch.equal(twin(x), expected)


def test_a_whole_network_is_copied_with_its_learned_masks() -> None:
    made = network(prune_rate=0.5)
    optimizer = fairseq_adam([p for p in made.parameters() if p.requires_grad])
    made(WAVEFORM)[0].square().sum().backward()
    optimizer.step()
    twin = copy.deepcopy(made).eval()
    torch.testing.assert_close(twin(WAVEFORM)[0], made.eval()(WAVEFORM)[0], rtol=0, atol=0)


def test_checkpoints_hold_parameters_only() -> None:
    module = masked("linear")
    module(inputs("linear"))
    assert set(module.state_dict()) == {"weight", "bias", "scores"}
    assert set(masked("weight norm").state_dict()) == {"weight_g", "weight_v", "bias", "scores"}


# ---------------------------------------------------------------- baking


@each_kind
@pytest.mark.parametrize("pattern", PATTERNS)
def test_baked_is_masked(kind: str, pattern: str) -> None:
    module, x = masked(kind, rule(0.5, pattern=pattern)), inputs(kind)
    plain = bake_alone(module)
    assert not isinstance(plain, Masked) and not any("scores" in name for name in plain.state_dict())
    torch.testing.assert_close(plain(x), module(x), rtol=1e-6, atol=1e-6)
    assert {n: tuple(p.shape) for n, p in plain.named_parameters()} == {
        n: tuple(p.shape) for n, p in module.named_parameters() if n != "scores"
    }


def test_a_kernel_position_without_any_connection() -> None:
    """Its norm is 0, which weight normalisation would divide by."""
    module, x = masked("weight norm", rule(0.5)), inputs("weight norm")
    with torch.no_grad():
        module.scores[:, :, 2] *= 1e-6
    assert not module.mask()[:, :, 2].any()
    plain = bake_alone(module)
    assert plain(x).isfinite().all()
    torch.testing.assert_close(plain(x), module(x), rtol=1e-6, atol=1e-6)
    module(x).square().sum().backward()
    assert module.scores.grad.isfinite().all()


@pytest.mark.parametrize("mode", ["layer_norm", "default"])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_baked_network_is_an_ordinary_one(mode: str, depth: int) -> None:
    config = dataclasses.replace(CONFIG, extractor_mode=mode, pos_conv_depth=depth, pos_conv_kernel=15, conv_bias=True)
    torch.manual_seed(0)
    made = MaskedNetwork(config, 7)
    names = set(made.state_dict())
    made.add_masks(
        MaskOptions(0.5, no_prune_proj=False, no_prune_extractor=False, no_prune_pos=False, trainable_bias=True)
    )
    made.train()
    padding = torch.zeros(2, 6000, dtype=torch.bool)
    padding[1, 4000:] = True
    expected = made(WAVEFORM, padding)[0]
    number = len(made.masked_modules())
    assert made.bake() == number == 7 + 1 + depth + 12 + 1
    assert set(made.state_dict()) == names and not list(masked_modules(made))
    torch.testing.assert_close(made(WAVEFORM, padding)[0], expected, rtol=1e-5, atol=1e-6)
    assert all(m.training for m in made.modules())
    assert made.bake() == 0

    stranger = MaskedNetwork(config, 7)
    stranger.load_state_dict(made.state_dict())
    torch.testing.assert_close(stranger(WAVEFORM, padding)[0], expected, rtol=1e-5, atol=1e-6)


def test_baking_in_half_precision() -> None:
    module = masked("weight norm").half()
    x = inputs("weight norm", torch.float16)
    plain = bake_alone(module)
    torch.testing.assert_close(plain(x), module(x), rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------- the rest


def test_parameters_are_shared_with_the_dense_module() -> None:
    parent = nn.Sequential(nn.Linear(4, 3))
    weight, bias = parent[0].weight, parent[0].bias
    module = mask_module(parent, "0", rule(0.5))
    assert parent[0] is module and module.weight is weight and module.bias is bias


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_taken_over(training: bool) -> None:
    parent = nn.Sequential(nn.Linear(4, 3)).train(training)
    assert mask_module(parent, "0", rule(0.5)).training is training


def test_modules_without_a_masked_form_are_refused() -> None:
    parent = nn.Sequential(nn.LayerNorm(4))
    with pytest.raises(TypeError, match="0 is a LayerNorm, which has no masked form"):
        mask_module(parent, "0", rule(0.5))


def test_a_weight_that_cannot_hold_the_pattern_is_refused() -> None:
    parent = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"2:4 .* 0 must have a multiple of 4 of them, but has 6"):
        mask_module(parent, "0", rule(0.5, pattern="2:4"))


def test_kept_share_counts_connections() -> None:
    parent = nn.ModuleDict({"small": nn.Linear(10, 10), "large": nn.Linear(30, 10)})
    mask_module(parent, "small", rule(0.5)).reset_scores("uniform")
    mask_module(parent, "large", rule(0.9, pattern="rows")).reset_scores("uniform")
    assert kept_share(masked_modules(parent)) == (50 + 300) / 400  # of 10 rows int(0.9999999) = 0 go
    assert kept_share(iter(())) != kept_share(iter(()))  # NaN


def test_what_is_printed_names_the_shape() -> None:
    for kind in ("linear", "conv"):
        assert "8" in repr(masked(kind))


def test_reset_scores_starts_from_the_present_weights() -> None:
    module = masked("weight norm")
    module.reset_scores("weight_magnitude_with_scale", scale=2.0)
    torch.testing.assert_close(module.scores, module.dense_weight() / 2)
    with torch.no_grad():
        module.weight_g.mul_(3)
    module.reset_scores("weight_magnitude_with_scale")
    torch.testing.assert_close(module.scores, module.dense_weight())
