"""Elastic weight consolidation: weights that an old task needs are held where it left them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from s3distill.losses.precision import at_least_float32

_MAX_NAMED = 3  # parameters that a message names
_SAME = 0.01  # relative distance within which weights are the same, rounded to bfloat16


def ewc_penalty(parameters: Mapping[str, Tensor], fisher: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> Tensor:
    """sum_i F_i (theta_i - theta*_i)^2  (Kirkpatrick et al., 2017, eq. 3, without its factor 1/2).

    Chosen here: no 1/2, as in the Whisper work that this project's default weights are from; the paper's lambda is twice as
    large for the same penalty. One sum per old task; add them up.

    Args:
        parameters: theta by name, of which those in ``fisher`` count.
        fisher: F by name, at least 0, shaped as the parameter.
        means: theta*, the same names and shapes.
    Returns:
        [] float32 (float64 of such parameters), differentiable in ``parameters``.
    """
    terms = [
        (values * (at_least_float32(parameters[name]) - means[name]).square()).sum() for name, values in fisher.items()
    ]
    return torch.stack(terms).sum()


def check_fisher_fits(fisher: Mapping[str, Tensor], parameters: Mapping[str, Tensor], source: str) -> None:
    """A Fisher file must be of a model of this shape: the same names, each with the same shape.

    Args:
        parameters: what is to be held: encoder and head, without what the old model did not have (gates, scores).
        source: what messages call the file.
    Raises:
        ValueError: it does not fit, with the names.
    """
    foreign, lacking = sorted(fisher.keys() - parameters.keys()), sorted(parameters.keys() - fisher.keys())
    if foreign or lacking:
        raise ValueError(
            f"{source} must be the Fisher information of a model of this shape, but the model lacks {_listed(foreign)} and the file "
            f"{_listed(lacking)}; compute it for the checkpoint that this training starts from: s3distill fisher CKPT MANIFEST"
        )
    for name, values in fisher.items():
        if values.shape != parameters[name].shape:
            raise ValueError(
                f"{source} must be the Fisher information of a model of this shape, but {name} is {list(values.shape)} there and "
                f"{list(parameters[name].shape)} in the model; a head over other symbols cannot be held (criterion.ewc_head=false), an "
                "encoder of another size neither"
            )


def check_starts_there(means: Sequence[Mapping[str, Tensor]], parameters: Mapping[str, Tensor], sources: str) -> None:
    """A run that begins must begin where one of its old tasks left the weights; those of earlier tasks are elsewhere.

    Args:
        means: theta* of each file.
        parameters: the weights at the start; those of other precision round by less than the tolerance.
        sources: what messages call the files.
    Raises:
        ValueError: the nearest theta* is more than `_SAME` of its own norm away: the files are of another model.
    """
    distances = []
    for of_file in means:
        gap = sum(float((at_least_float32(parameters[n].detach()) - m).square().sum()) for n, m in of_file.items())
        distances.append((gap / max(sum(float(m.square().sum()) for m in of_file.values()), 1e-30)) ** 0.5)
    if min(distances) > _SAME:
        raise ValueError(
            f"{sources} must be the Fisher information of the model that this training starts from, but its weights are "
            f"{min(distances):.0%} away from those: another model of the same shape; start from that one (model.student_path, or "
            "model.w2v_path for a new head), or compute it for this one: s3distill fisher CKPT MANIFEST"
        )


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "") if names else "nothing"
