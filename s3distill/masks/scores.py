"""Where the scores of a mask start: the initialisers of S3-Router, from noise or from the weights' magnitudes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from s3distill.masks.selection import keep_largest, num_removed, select

INITS = (
    "kaiming_uniform",
    "kaiming_normal",
    "xavier_normal",
    "uniform",
    "normal",
    "zero",
    "one",
    "weight_magnitude",
    "negative_weight_magnitude",
    "weight_rank",
    "weight_magnitude_with_scale",
)
FROM_WEIGHTS = ("weight_magnitude", "negative_weight_magnitude", "weight_rank", "weight_magnitude_with_scale")


@torch.no_grad()
def init_scores(
    scores: Tensor,
    weight: Tensor,
    method: str,
    density: float,
    pattern: str = "unstructured",
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> None:
    """Fills ``scores`` in place  (options ``init_score`` and ``init_score_scale`` of S3-Router).

    - ``kaiming_uniform`` (a = sqrt(5)), ``kaiming_normal``, ``xavier_normal``, ``uniform`` in [0, 1), ``normal``, ``zero``, ``one``:
      whatever the weights are. S3-Router's code draws ``xavier_normal`` from a uniform distribution; this one is normal.
    - ``weight_magnitude``: 1 where |weight| is among the kept share, else 0; ``negative_weight_magnitude``: 1 for the smallest.
    - ``weight_rank``: kaiming_uniform noise in an order in which |scores| ranks like |weight|.
    - ``weight_magnitude_with_scale``: weight / scale.

    With one score per row or column the mean of |weight| over it stands for the weight.

    Args:
        scores: see `selection.scores_shape`.
        weight: the frozen weight, [out, in, ...].
        density, pattern: of the mask, for the methods that make one.
        scale: of ``weight_magnitude_with_scale``; not 0.
        generator: of the noise, which is drawn on the CPU so that it is the same on every device.
    Raises:
        ValueError: unknown method.
    """
    source = _reduced(weight.float(), scores.shape)
    if method in _NOISE:
        scores.copy_(_noise(method, scores.shape, generator))
    elif method in ("zero", "one"):
        nn.init.constant_(scores, float(method == "one"))
    elif method == "weight_magnitude":
        scores.copy_(select(source, density, pattern))
    elif method == "negative_weight_magnitude":
        smallest = _smallest(source, density, pattern)
        scores.copy_(smallest)
    elif method == "weight_rank":
        noise = _noise("kaiming_uniform", scores.shape, generator).to(scores.device).flatten()
        ranked = torch.empty_like(noise)
        ranked[source.flatten().abs().argsort(stable=True)] = noise[noise.abs().argsort(stable=True)]
        scores.copy_(ranked.view_as(scores))
    elif method == "weight_magnitude_with_scale":
        scores.copy_(source / scale)
    else:
        raise ValueError(f"`init_score` must be one of {', '.join(INITS)}, but is {method!r}")


_NOISE: dict[str, Callable[..., Tensor]] = {
    "kaiming_uniform": functools.partial(nn.init.kaiming_uniform_, a=math.sqrt(5)),
    "kaiming_normal": nn.init.kaiming_normal_,
    "xavier_normal": nn.init.xavier_normal_,
    "uniform": nn.init.uniform_,
    "normal": nn.init.normal_,
}


def _noise(method: str, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    noise = torch.empty(shape, dtype=torch.float32)
    _NOISE[method](noise, generator=generator)
    return noise


def _smallest(source: Tensor, density: float, pattern: str) -> Tensor:
    if pattern == "2:4":
        return ~select(source, density, pattern)  # the two that 2:4 would have removed
    magnitudes = -source.abs()
    return keep_largest(magnitudes, num_removed(density, magnitudes.numel()))


def _reduced(weight: Tensor, shape: torch.Size) -> Tensor:
    """The weight itself, or the mean of |weight| over each row or column where there is one score for it."""
    if weight.shape == shape:
        return weight
    dims = [i for i, (full, one) in enumerate(zip(weight.shape, shape, strict=True)) if one == 1 and full != 1]
    return weight.abs().mean(dims, keepdim=True) if dims else weight.abs()
