"""`wav2vec_seq2seq_student`: any encoder that s3distill reads, and fairseq's Transformer decoder over it."""

# no `from __future__ import annotations`: fairseq reads the types of config fields
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

from fairseq.models import FairseqEncoderDecoderModel, register_model
from fairseq.models.wav2vec.wav2vec2_asr import Embedding, TransformerDecoder, Wav2Vec2Seq2SeqConfig
from torch import Tensor

from s3distill.models._decoder_start import start_decoder
from s3distill.models._seq2seq_encoder import Seq2SeqEncoder


@dataclass
class Wav2VecSeq2SeqStudentConfig(Wav2Vec2Seq2SeqConfig):
    """The options of fairseq's `wav2vec_seq2seq`, and where the decoder starts from."""

    decoder_path: Optional[str] = field(
        default=None,
        metadata={
            "help": "a trained model with a decoder of the same dictionary and shape, whose decoder this one starts from; "
            "empty: random weights"
        },
    )
    decoder_init_layers: str = field(
        default="",
        metadata={"help": "layers of decoder_path to take: first:2, every:3 or a list such as 0,5; empty: all"},
    )


@register_model("wav2vec_seq2seq_student", dataclass=Wav2VecSeq2SeqStudentConfig)
class Wav2VecSeq2SeqStudent(FairseqEncoderDecoderModel):
    """Encoder from ``w2v_path`` (pre-trained, compact, fine-tuned or a folder of transformers), decoder from ``decoder_path``.

    Its parameters have the names of stock `wav2vec_seq2seq` (``encoder.w2v_model.…``, ``encoder.proj``, ``decoder.…``), and
    `fairseq-generate` decodes it with its own beam search.
    """

    def __init__(self, cfg: Any, encoder: Seq2SeqEncoder, decoder: TransformerDecoder) -> None:
        super().__init__(encoder, decoder)
        self.cfg = cfg  # with `w2v_args`: fairseq's tasks take it into the checkpoint

    @classmethod
    def build_model(cls, cfg: Wav2VecSeq2SeqStudentConfig, task: Any) -> "Wav2VecSeq2SeqStudent":
        """Encoder, decoder, and the weights that they start from; a checkpoint's own rebuilds need no other file."""
        rebuilds = cfg.w2v_args is not None
        if not rebuilds:
            _check(cfg, task)
        encoder = Seq2SeqEncoder(cfg)
        dictionary = task.target_dictionary
        embedding = Embedding(len(dictionary), cfg.decoder_embed_dim, dictionary.pad())
        decoder = TransformerDecoder(cfg, dictionary, embedding)
        if cfg.decoder_path and not rebuilds:
            start_decoder(decoder, cfg, dictionary)
        return cls(cfg, encoder, decoder)

    def forward(
        self,
        source: Tensor,
        padding_mask: Optional[Tensor],
        prev_output_tokens: Tensor,
        utterances: Optional[Tensor] = None,
        **_: Any,
    ) -> Tuple[Tensor, Dict[str, Any]]:
        """Teacher-forced: the next symbol at each position of one or more texts per utterance.

        Args:
            source: [B, S], 16 kHz.
            padding_mask: [B, S], True = padding, or None.
            prev_output_tokens: texts behind an eos, [N, U] int64, padded at the end.
            utterances: which row of ``source`` each text is of, [N] int64; None: N = B, one each.
        Returns:
            Logits [N, U, V]; and the decoder's extras with ``encoder_out``, a dict of ``encoder_out`` [T, B, C] and
            ``padding_mask`` [B, T] or None.
        """
        encoder_out = self.encoder(source, padding_mask)
        attended = encoder_out if utterances is None else self.encoder.reorder_encoder_out(encoder_out, utterances)
        logits, extra = self.decoder(prev_output_tokens, encoder_out=attended)
        return logits, {**extra, "encoder_out": encoder_out}


def _check(cfg: Any, task: Any) -> None:
    if not cfg.autoregressive:
        raise ValueError(
            "`task.autoregressive` must be true for wav2vec_seq2seq_student, whose decoder reads the text so far, but is false; pass "
            "task.autoregressive=true"
        )
    if task.target_dictionary is None:
        raise ValueError(
            f"`model._name` wav2vec_seq2seq_student needs a task with a dictionary, but the task is {type(task).__name__}; pass "
            "task._name=audio_ctc"
        )
    if cfg.decoder_init_layers and not cfg.decoder_path:
        raise ValueError(
            f"`model.decoder_init_layers` names layers of model.decoder_path, but that is empty, and it is {cfg.decoder_init_layers!r}; "
            "pass model.decoder_path=TEACHER.pt, or leave it out"
        )
