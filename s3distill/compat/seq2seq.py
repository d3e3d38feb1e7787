"""Repairs of stock fairseq's attention decoders for speech, `wav2vec_seq2seq` and `hubert_seq2seq`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def know_decoders() -> None:
    """Lets stock decoders have any width, and their checkpoints rebuild without the file of ``w2v_path``."""
    from fairseq.models.hubert import hubert_asr
    from fairseq.models.wav2vec import wav2vec2_asr

    for module in (wav2vec2_asr, hubert_asr):
        module.TransformerDecoderLayer = _layer
    for model in (wav2vec2_asr.Wav2Vec2Seq2SeqModel, hubert_asr.HubertSeq2SeqModel):
        model.build_model = classmethod(_keeping_config(model.build_model.__func__))


def _layer(cfg: Any, *values: Any, **options: Any) -> Any:
    """A decoder's layer, told how wide what it attends to is.

    The encoder's output arrives with ``decoder_embed_dim`` channels, projected where it had another number. Stock reads
    ``encoder_embed_dim``: `wav2vec_seq2seq` has no such option, so that it is 512, and `hubert_seq2seq` has one that must agree.
    """
    from fairseq.modules import TransformerDecoderLayer
    from omegaconf import OmegaConf, open_dict

    if OmegaConf.is_config(cfg):
        with open_dict(cfg):  # a copy that the decoder made for its layers
            cfg.encoder_embed_dim = cfg.decoder_embed_dim
    return TransformerDecoderLayer(cfg, *values, **options)


def _keeping_config(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps on the model what it was built from: fairseq's tasks take the encoder's options from there into checkpoints."""

    def build_model(cls: Any, cfg: Any, task: Any) -> Any:
        model = stock(cls, cfg, task)
        model.cfg = cfg
        return model

    return build_model
