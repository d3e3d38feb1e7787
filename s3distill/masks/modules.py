"""Modules whose weight is masked: drop-in replacements of the encoder's Linear, Conv1d and weight-normed convolution.

The masked weight is computed when scores or weights have changed, which is once per optimizer update: not per
micro-batch, not again in a recomputed forward, not in evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from s3distill import convolutions, products
from s3distill.encoder.positional import WeightNormConv
from s3distill.masks.scores import init_scores
from s3distill.masks.selection import check_pattern, scores_shape, select
from s3distill.masks.straight_through import StraightThrough, score_slope

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    """Optimizers that write through ``param.data``, as fairseq's do, leave a tensor's version alone: their steps are counted."""
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


@dataclass(frozen=True)
class MaskRule:
    """How the mask of one weight comes from its scores.

    Attributes:
        density: share of connections that stay, in (0, 1].
        pattern: one of `selection.PATTERNS`.
        ste_sigmoid: scale the scores' gradient by sigmoid'(|score|).
    """

    density: float
    pattern: str = "unstructured"
    ste_sigmoid: bool = False


class Masked(nn.Module):
    """What the masked modules share: ``scores`` beside the weight, and the cached product of weight and mask.

    ``scores`` stay float32 when the model is cast (in float16 a matrix of 2.4 million scores has 10,000 distinct values).
    """

    weight_names: ClassVar[tuple[str, ...]] = ("weight",)  # of the parameters behind the weight
    scores: nn.Parameter
    rule: MaskRule

    def add_mask(self, rule: MaskRule, name: str) -> None:
        """Adds scores (not yet initialised: see `reset_scores`)."""
        weight = self.dense_weight()
        check_pattern(rule.pattern, weight.shape, name)
        self.rule = rule
        self.scores = nn.Parameter(
            torch.zeros(scores_shape(rule.pattern, weight.shape), dtype=torch.float32, device=weight.device)
        )
        self._masked: Tensor | None = None
        self._mask: Tensor | None = None
        self._slope: Tensor | None = None
        self._state: tuple[Any, ...] = ()
        self.num_refreshes = 0

    def dense_weight(self) -> Tensor:
        """The weight that is masked, [out, in, ...], differentiable in its parameters."""
        raise NotImplementedError

    def weight_parameters(self) -> list[nn.Parameter]:
        """The parameters behind `dense_weight`."""
        return [getattr(self, name) for name in self.weight_names]

    def unmasked(self, weight: Tensor) -> nn.Module:
        """The plain module with this weight [out, in, ...] in place of the masked one."""
        raise NotImplementedError

    def reset_scores(self, method: str, scale: float = 1.0, generator: torch.Generator | None = None) -> None:
        """Starts the scores anew from the present weights, see `scores.init_scores`."""
        with torch.no_grad():
            weight = self.dense_weight()
        init_scores(self.scores, weight, method, self.rule.density, self.rule.pattern, scale, generator)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """The binary mask, bool, of the weight's shape."""
        return select(self.scores, self.rule.density, self.rule.pattern).expand(self.dense_weight().shape)

    def masked_weight(self) -> Tensor:
        """W * mask, [out, in, ...]; with gradients for scores and weight where they learn. The next update overwrites it."""
        self._refresh()
        assert self._masked is not None
        if not torch.is_grad_enabled() or not (self.scores.requires_grad or self._weight_learns()):
            return self._masked
        return StraightThrough.apply(self.scores, self.dense_weight(), self._masked, self._slope, self._mask)  # type: ignore[no-any-return]

    def _weight_learns(self) -> bool:
        return any(p.requires_grad for p in self.weight_parameters())

    def _current_state(self) -> tuple[Any, ...]:
        """Changes whenever the masked weight might have to be computed again."""
        # every forward comes here: attributes of a module and generators would take four times as long
        parameters: dict[str, Any] = self._parameters
        tensors: list[Tensor] = [parameters[name] for name in ("scores", *self.weight_names)]
        learns = any([t.requires_grad for t in tensors])
        # a tensor that was made in inference mode has no version: nothing equals the object that stands for it
        versions = [
            (object() if t.is_inference() else t._version, t.data_ptr(), t.dtype, t.requires_grad) for t in tensors
        ]
        return (_optimizer_steps if learns else 0, self.rule, *versions)

    def _refresh(self) -> None:
        state = self._current_state()
        if state == self._state:
            return
        # tensors that are made in inference mode could not be saved for a later backward pass
        with torch.inference_mode(False), torch.no_grad():
            weight = self.dense_weight()
            mask = select(self.scores, self.rule.density, self.rule.pattern)
            self._state = ()  # whatever happens from here on, what is overwritten is of no state
            # bytes and in two steps: a product of float and bool takes three times as long on the CPU
            self._masked = _storage(self._masked, weight).copy_(mask.view(torch.uint8)).mul_(weight)
            self._mask = mask if self._weight_learns() else None
            slope, self._slope = self._slope, None
            if self.scores.requires_grad:
                self._slope = score_slope(self.scores, weight, self.rule.ste_sigmoid, out=_storage(slope, weight))
        self._state = state
        self.num_refreshes += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_scores(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if tensor.data_ptr() != scores.data_ptr() or result.dtype == tensor.dtype:
                return result
            return tensor.to(result.device)  # moved, but not rounded

        scores = self.scores.data
        result: Any = super()._apply(keep_scores, recurse)  # type: ignore[no-untyped-call]
        self._state = ()
        return result  # type: ignore[no-any-return]


class MaskedLinear(Masked, nn.Linear):
    """A Linear (its parameters are shared, not copied) with scores beside its weight."""

    def __init__(self, dense: nn.Linear, rule: MaskRule, name: str = "the Linear") -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.weight, self.bias = dense.weight, dense.bias
        self.add_mask(rule, name)

    def dense_weight(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return products.linear(x, self.masked_weight(), self.bias)

    def unmasked(self, weight: Tensor) -> nn.Module:
        return _with_weight(
            products.Linear(self.in_features, self.out_features, self.bias is not None, "meta"), weight, self.bias
        )


_CONV_SHAPE = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    *("transposed", "output_padding", "_reversed_padding_repeated_twice"),
)


class MaskedConv1d(Masked, nn.Conv1d):
    """A Conv1d of the waveform extractor or of data2vec's positional stack, masked."""

    def __init__(self, dense: nn.Conv1d, rule: MaskRule, name: str = "the convolution") -> None:
        nn.Module.__init__(self)
        for name_of_shape in _CONV_SHAPE:
            setattr(self, name_of_shape, getattr(dense, name_of_shape))
        self.weight, self.bias = dense.weight, dense.bias
        self.add_mask(rule, name)

    def dense_weight(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.padding == (0,) and self.groups == 1 and self.in_channels > 1:  # as the extractor calls a plain one
            return convolutions.conv1d(x, self.masked_weight(), self.bias, self.stride[0])
        return self._conv_forward(x, self.masked_weight(), self.bias)

    def unmasked(self, weight: Tensor) -> nn.Module:
        plain = nn.Conv1d(
            *(self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding),  # type: ignore[arg-type]
            groups=self.groups,
            bias=self.bias is not None,
            device="meta",
        )
        return _with_weight(plain, weight, self.bias)


class MaskedWeightNormConv(Masked, WeightNormConv):
    """The positional convolution, masked on its effective weight g * v / ||v||, which is computed from g and v as they are now."""

    weight_names = ("weight_g", "weight_v")

    def __init__(self, dense: WeightNormConv, rule: MaskRule, name: str = "the positional convolution") -> None:
        nn.Module.__init__(self)
        self.kernel, self.groups = dense.kernel, dense.groups
        self.bias, self.weight_g, self.weight_v = dense.bias, dense.weight_g, dense.weight_v
        self.add_mask(rule, name)

    def dense_weight(self) -> Tensor:
        return WeightNormConv.weight.__get__(self)

    @property
    def weight(self) -> Tensor:
        return self.masked_weight()

    def unmasked(self, weight: Tensor) -> nn.Module:
        plain = WeightNormConv.__new__(WeightNormConv)
        nn.Module.__init__(plain)
        plain.kernel, plain.groups = self.kernel, self.groups
        plain.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        norm = weight.norm(dim=(0, 1), keepdim=True)
        plain.weight_g = nn.Parameter(norm)
        # a kernel position with nothing left has g = 0 and any direction but 0 / 0
        plain.weight_v = nn.Parameter(torch.where(norm > 0, weight, torch.ones_like(weight)))
        return plain


def _storage(old: Tensor | None, like: Tensor) -> Tensor:
    """A tensor to write to, shaped as ``like``: ``old`` where it fits, since new pages cost as much as what is written to them.

    A backward pass that still needs what was there raises: autograd saves a tensor with its version. A copy of a module that
    was made in inference mode has no versions, and cannot be written to later.
    """
    if old is None or old.is_inference():
        return torch.empty_like(like)
    fits = (old.shape, old.dtype, old.device) == (like.shape, like.dtype, like.device)
    return old if fits else torch.empty_like(like)


def _with_weight(plain: nn.Linear | nn.Conv1d, weight: Tensor, bias: Tensor | None) -> nn.Module:
    plain.weight = nn.Parameter(weight)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return plain


def mask_module(parent: nn.Module, name: str, rule: MaskRule) -> Masked:
    """Replaces the submodule ``name`` of ``parent`` by its masked form and returns it.

    Raises:
        TypeError: no masked form exists for that kind of module.
        ValueError: the module cannot hold the pattern.
    """
    dense = parent.get_submodule(name)
    masked: Masked
    if isinstance(dense, WeightNormConv):
        masked = MaskedWeightNormConv(dense, rule, name)
    elif isinstance(dense, nn.Conv1d):
        masked = MaskedConv1d(dense, rule, name)
    elif isinstance(dense, nn.Linear):
        masked = MaskedLinear(dense, rule, name)
    else:
        raise TypeError(f"{name} is a {type(dense).__name__}, which has no masked form")
    masked.train(dense.training)
    _replace(parent, name, masked)
    return masked


def masked_modules(root: nn.Module) -> Iterator[tuple[str, Masked]]:
    """Names and masked modules below ``root``."""
    for name, module in root.named_modules():
        if isinstance(module, Masked):
            yield name, module


@torch.no_grad()
def bake(root: nn.Module) -> int:
    """Multiplies every mask into its weight and puts plain modules in place; returns how many there were.

    What is left is an ordinary dense model of the same keys: no scores, no cost. It computes what the masked one did.
    """
    found = list(masked_modules(root))
    for name, module in found:
        plain = module.unmasked(module.masked_weight().detach().clone())
        plain.train(module.training).requires_grad_(False)
        _replace(root, name, plain)
    return len(found)


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    holder = root.get_submodule(parent)
    if child.isdigit() and isinstance(holder, nn.Sequential | nn.ModuleList):
        holder[int(child)] = module
    else:
        setattr(holder, child, module)


def kept_share(modules: Iterator[tuple[str, Masked]]) -> float:
    """Share of the masked connections that stay, over all modules (NaN without any)."""
    kept, total = 0, 0
    for _, module in modules:
        mask = module.mask()
        kept, total = kept + int(torch.count_nonzero(mask)), total + math.prod(mask.shape)
    return kept / total if total else math.nan
