"""The frozen teacher of a student with a decoder: nothing that the student's checkpoint, DDP or optimizer sees."""

import logging
from typing import Any, Dict, Tuple

import torch
from fairseq import checkpoint_utils, models
from fairseq.data import Dictionary
from torch import Tensor

from s3distill import kernels
from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.teacher import DTYPES
from s3distill.models._decoder_start import check_dictionary, read_decoder

logger = logging.getLogger(__name__)


class Seq2SeqTeacher:
    """A trained model with encoder and decoder in eval mode, run under `inference_mode` and in a precision of its own.

    It is no `nn.Module` on purpose: a task that holds it adds nothing to checkpoints, DDP or the optimizer.

    Args:
        path: checkpoint of stock `wav2vec_seq2seq` or of `wav2vec_seq2seq_student`.
        dtype: one of `encoder.teacher.DTYPES`.
        task: the student's task, whose dictionary must be the teacher's.
    Attributes:
        config: shape of its encoder.
        normalize: whether its waveforms are normalised.
    Raises:
        FileNotFoundError, ValueError: the file cannot be read, has no decoder, or another dictionary.
    """

    def __init__(self, path: str, dtype: str, task: Any) -> None:
        parsed, _, num_layers = read_decoder(path)
        dictionary: Dictionary = task.target_dictionary
        check_dictionary(parsed, dictionary, path)
        self.name, self.normalize, self.dtype = f"teacher {path}", parsed.normalize, DTYPES[dtype]
        self.config: EncoderConfig = parsed.config
        state = checkpoint_utils.load_checkpoint_to_cpu(path)
        model = models.build_model(state["cfg"].model, task, from_checkpoint=True)
        model.load_state_dict(state["model"], strict=True, model_cfg=state["cfg"].model)
        self._model = model.eval().requires_grad_(False).to(self.dtype)
        logger.info(
            "%s: encoder of %d layers and width %d, decoder of %d layers and width %d, %s",
            *(self.name, self.config.num_layers, self.config.embed_dim, num_layers, self.decoder_dim, self.dtype),
        )

    @property
    def decoder_dim(self) -> int:
        """Channels of what its decoder attends to."""
        return int(self._model.decoder.output_embed_dim)

    def __call__(self, net_input: Dict[str, Any]) -> Tuple[Tensor, Dict[str, Any]]:
        """Runs encoder and decoder on a batch, each text behind what it says so far.

        Args:
            net_input: ``source`` [B, S], ``padding_mask`` [B, S] or None, ``prev_output_tokens`` [B, U].
        Returns:
            Logits [B, U, V] float32; ``encoder_out`` [T, B, C] float32 and ``padding_mask`` [B, T] or None.
        """
        source, padding_mask = net_input["source"], net_input.get("padding_mask")
        if next(self._model.parameters()).device != source.device:
            self._model.to(source.device)
        # autocast is the student's affair: this one has a precision of its own
        with torch.inference_mode(), kernels.without_autocast(source.device):
            encoder_out = self._model.encoder(source=source.to(self.dtype), padding_mask=padding_mask)
            logits, _ = self._model.decoder(net_input["prev_output_tokens"], encoder_out=encoder_out)
        # cloned outside of inference mode: losses save their targets for the backward pass
        mask = encoder_out["padding_mask"]
        states = {
            "encoder_out": encoder_out["encoder_out"].clone().float(),
            "padding_mask": None if mask is None else mask.clone(),
        }
        return logits.clone().float(), states
