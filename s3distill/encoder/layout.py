"""A model as a fairseq checkpoint has it: the weights under fairseq's names, the options that rebuild it, its dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def checkpoint_layout(
    options: Mapping[str, Any],
    encoder_state: Mapping[str, Tensor],
    normalize: bool,
    head_state: Mapping[str, Tensor] | None = None,
    symbols: list[str] | None = None,
    pooled: bool = False,
    extra_state: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """The keys ``model``, ``cfg`` and ``task_state`` of a checkpoint that `parse_checkpoint` takes apart again.

    Args:
        options: of the encoder's model, ``_name`` included.
        head_state: ``weight`` [V, C] and ``bias`` [V]; with a head it is a fine-tuned model, `wav2vec_ctc` or, where the head
            is for whole utterances (``pooled``), `wav2vec_label_st`; without, a pre-trained one.
        symbols: dictionary or classes of the head.
        extra_state: what stands beside the encoder of a pre-trained model (``gates.*``, ``heads.*``).
    """
    task = {"_name": "audio_pretraining", "data": "", "normalize": normalize}
    if head_state is None:
        return {
            "cfg": {"model": dict(options), "task": task},
            "model": {**encoder_state, **(extra_state or {})},
            "task_state": {},
        }
    model = {
        "_name": "wav2vec_label_st" if pooled else "wav2vec_ctc",
        **{"w2v_path": "", "data": "", "normalize": normalize},
        "w2v_args": {"model": dict(options), "task": task},
    }
    weights = {f"w2v_encoder.w2v_model.{name}": value for name, value in encoder_state.items()}
    weights |= {f"w2v_encoder.proj.{name}": value for name, value in head_state.items()}
    weights |= {f"w2v_encoder.w2v_model.{name}": value for name, value in (extra_state or {}).items()}
    task_state: dict[str, Any] = {}
    if symbols is not None:
        task_state = {"classes": list(symbols)} if pooled else {"target_dictionary": {"symbols": list(symbols)}}
    task = {**task, "_name": "audio_labels" if pooled else "audio_finetuning"}
    return {"cfg": {"model": model, "task": task}, "model": weights, "task_state": task_state}
