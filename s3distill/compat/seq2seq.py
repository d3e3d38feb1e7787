"""Stock fairseq's attention decoders for speech: `wav2vec_seq2seq` and `hubert_seq2seq`."""

from __future__ import annotations

from typing import Any


def know_cross_attention() -> None:
    """Lets stock decoders have any width: their config does not say how wide what they attend to is, and fairseq takes 512.

    The encoder's output arrives with ``decoder_embed_dim`` channels, projected where it had another number (fairseq's
    `TransformerDecoderLayerBase.build_encoder_attention` reads ``encoder_embed_dim``, which these configs lack).
    """
    from fairseq.models.hubert import hubert_asr
    from fairseq.models.wav2vec import wav2vec2_asr
    from fairseq.modules import TransformerDecoderLayer
    from omegaconf import OmegaConf, open_dict

    def layer(cfg: Any, *values: Any, **options: Any) -> Any:
        # a copy that the decoder made for its layers
        if OmegaConf.is_config(cfg) and cfg.get("encoder_embed_dim") is None:
            with open_dict(cfg):
                cfg.encoder_embed_dim = cfg.decoder_embed_dim
        return TransformerDecoderLayer(cfg, *values, **options)

    for module in (wav2vec2_asr, hubert_asr):
        module.TransformerDecoderLayer = layer
