"""Prediction heads that stay: what an encoder gives is their prediction of the teacher, also in fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from s3distill.heads.layer_heads import HeadsConfig, LayerHeads


class KeptHeads(nn.Module):
    """sum_j softmax(a)_j p_j over the predictions p_j of `LayerHeads`; one head alone has no weight.

    The weights are those of SUPERB's downstream models (Yang et al., 2021), over heads instead of hidden layers: a task that
    is fine-tuned learns which of the teacher's layers it reads (the weights that Chang et al., 2022, DistilHuBERT, plot; how
    they learnt them was not at hand). They are no weights of the distillation's losses: softmax weights that minimise a
    weighted loss would go to the layer that is easiest to predict.

    Keys: those of `LayerHeads`, and ``layer_weights`` [N], a, 0 at the start.
    """

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.heads = LayerHeads(config)
        num_heads = len(config.pairs)
        self.layer_weights = nn.Parameter(torch.zeros(num_heads)) if num_heads > 1 else None

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Hidden states by layer, [B, T, C_s] each -> [B, T, C_t]."""
        predictions = self.heads(hidden_states)
        if self.layer_weights is None:
            return predictions[0]
        shares = self.layer_weights.softmax(0).to(predictions[0].dtype)
        total = predictions[0] * shares[0]
        for share, prediction in zip(shares[1:], predictions[1:], strict=True):
            total = total + share * prediction
        return total


def keep_heads(
    config: HeadsConfig, state: Mapping[str, Tensor], teacher_layers: Sequence[int] | None
) -> tuple[HeadsConfig, dict[str, Tensor]]:
    """The heads that predict ``teacher_layers``, as `KeptHeads` has them.

    Args:
        config, state: trained `LayerHeads`.
        teacher_layers: in the order that they are to have; None keeps all.
    Returns:
        config and parameters.
    Raises:
        ValueError: no head predicts such a layer, or heads that have nothing to keep or another frame rate than the student.
    """
    if config.mode == "none" or config.upsample > 1:
        reason = "without heads (mode none)" if config.mode == "none" else "whose heads change the frame rate"
        raise ValueError(f"a student {reason} cannot keep heads at inference; fine-tune it as it is")
    predicted = [teacher for _, teacher in config.pairs]
    wanted = predicted if teacher_layers is None else list(teacher_layers)
    lacking = [layer for layer in wanted if layer not in predicted]
    if lacking or not wanted or len(set(wanted)) != len(wanted):
        raise ValueError(
            f"the layers whose heads are kept must be different ones of {sorted(predicted)}, which are predicted, but are {wanted}"
        )
    picked = [predicted.index(layer) for layer in wanted]
    kept = dataclasses.replace(config, pairs=tuple(config.pairs[i] for i in picked), sharing="own", init="default")
    all_heads = LayerHeads(config)
    all_heads.load_state_dict(dict(state))
    found: dict[str, Tensor] = {}
    for new, old in enumerate(picked):
        linear = all_heads.linears[all_heads.linear_of_pair[old]]
        found |= {f"heads.linears.{new}.{name}": value for name, value in linear.state_dict().items()}
    if all_heads.hidden is not None:
        for name, value in all_heads.hidden.state_dict().items():
            chunks = value.chunk(len(predicted))  # the heads' first Linears are stacked
            found[f"heads.hidden.{name}"] = torch.cat([chunks[i] for i in picked])
    if len(picked) > 1:
        found["layer_weights"] = torch.zeros(len(picked))
    return kept, found
