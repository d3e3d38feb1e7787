"""The labels of a batch for `ctc_distill`: which utterances have some, and fairseq's `ctc` on logits that are there already."""

from typing import Any, Dict, NamedTuple, Optional

from fairseq import utils
from torch import Tensor


class Labelled(NamedTuple):
    """The part of a batch whose labels hold.

    Attributes:
        sample: fairseq's batch of these utterances.
        logits: [T, B', V].
        padding_mask: [B', T], True = padding, or None.
        num_frames: their valid frames.
    """

    sample: Dict[str, Any]
    logits: Tensor
    padding_mask: Optional[Tensor]
    num_frames: int


def labelled_part(
    sample: Any, logits: Tensor, padding_mask: Optional[Tensor], unmixed: Optional[Tensor]
) -> Optional[Labelled]:
    """The utterances with labels that were not mixed; None where there is none.

    Args:
        sample: fairseq's batch; ``labelled`` [B] bool where some have no labels.
        logits: [T, B, V].
        unmixed: [B] bool, or None: all.
    """
    rows = sample.get("labelled")
    if unmixed is not None:
        rows = unmixed if rows is None else rows & unmixed
    if rows is None or bool(rows.all()):
        return Labelled(sample, logits, padding_mask, num_valid(logits, padding_mask))
    if not bool(rows.any()):
        return None
    part = {name: sample[name][rows] for name in ("id", "target", "target_lengths")}
    part |= {"ntokens": int(part["target_lengths"].sum()), "net_input": {}}
    if "nbest" in sample:
        part["nbest"] = {name: value[rows] for name, value in sample["nbest"].items()}
    mask = None if padding_mask is None else padding_mask[rows]
    return Labelled(part, logits[:, rows], mask, num_valid(logits[:, rows], mask))


class GivenLogits:
    """A model that has computed its logits already, for fairseq's `ctc`."""

    def __init__(self, part: Labelled, training: bool) -> None:
        self.part, self.training = part, training

    def __call__(self, **_: Any) -> Dict[str, Any]:
        return {"padding_mask": self.part.padding_mask}

    def get_normalized_probs(self, net_output: Any, log_probs: bool) -> Tensor:
        assert log_probs
        return utils.log_softmax(self.part.logits.float(), dim=-1)  # type: ignore[no-any-return]


def num_valid(logits: Tensor, padding_mask: Optional[Tensor]) -> int:
    """Valid frames of a batch; logits [T, B, V]."""
    return logits.shape[0] * logits.shape[1] if padding_mask is None else int((~padding_mask).sum())
