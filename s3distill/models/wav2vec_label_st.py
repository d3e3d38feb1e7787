"""`wav2vec_label_st`: S3-Router for one label per utterance (what was said, who spoke, which language)."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
from dataclasses import dataclass
from typing import Any, Dict, Optional

from fairseq import utils
from fairseq.models import register_model
from torch import Tensor

from s3distill.models._fine_tuning import MaskedFairseqModel, build_masked
from s3distill.models.wav2vec_ctc_st import Wav2VecCtcStConfig


@dataclass
class Wav2VecLabelStConfig(Wav2VecCtcStConfig):
    """The options of `wav2vec_ctc_st`; ``blank_weight`` and ``blank_mode``, which are about CTC, must stay as they are.

    Dense fine-tuning of all weights, to compare masks with: ``prune_rate=1 co_train=true`` (nothing is masked, all weights learn;
    those of the conv extractor with ``feature_grad_mult`` above 0 only).
    """


@register_model("wav2vec_label_st", dataclass=Wav2VecLabelStConfig)
class Wav2VecLabelSt(MaskedFairseqModel):
    """Frozen encoder, learned masks, mean over the valid frames, head; under the keys of `wav2vec_ctc_st`."""

    @classmethod
    def build_model(cls, cfg: Wav2VecLabelStConfig, task: Any) -> "Wav2VecLabelSt":
        """A head with one output per class of the task, for the whole utterance."""
        if cfg.blank_weight != 0:
            raise ValueError(
                f"`model.blank_weight` must stay 0 in wav2vec_label_st, whose head has no blank, but is {cfg.blank_weight}; leave it out"
            )
        if cfg.blank_mode != Wav2VecLabelStConfig.blank_mode:
            raise ValueError(
                f"`model.blank_mode` must stay {Wav2VecLabelStConfig.blank_mode} in wav2vec_label_st, whose head has no blank, but is "
                f"{cfg.blank_mode}; leave it out"
            )
        if not hasattr(task, "classes"):
            raise ValueError(
                f"`model._name` wav2vec_label_st needs a task with one label per utterance, but the task is {type(task).__name__}; pass "
                "task._name=audio_labels, or model._name=wav2vec_ctc_st for transcripts"
            )
        return cls(cfg, build_masked(cfg, len(task.classes), pool=True))

    def get_logits(self, net_output: Dict[str, Any]) -> Tensor:
        """[B, V]"""
        return net_output["encoder_out"]

    def get_normalized_probs(self, net_output: Dict[str, Any], log_probs: bool, sample: Optional[Any] = None) -> Tensor:
        """Probabilities of the classes, or their natural logarithms, [B, V] float32."""
        normalize = utils.log_softmax if log_probs else utils.softmax
        return normalize(self.get_logits(net_output).float(), dim=-1)
