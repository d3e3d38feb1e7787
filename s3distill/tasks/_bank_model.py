"""A backbone under the masks of a bank, as a fairseq model: what `fairseq-generate --mask-bank` decodes with."""

from typing import Any, Optional

from fairseq.data import Dictionary
from fairseq.models import BaseFairseqModel
from fairseq.models.wav2vec.wav2vec2_asr import Wav2VecCtc
from omegaconf import OmegaConf
from torch import Tensor, nn

from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.masks.bank import MaskBank
from s3distill.masks.masked_model import MaskedModel


class BankModel(BaseFairseqModel):
    """Built empty; `load_state_dict` with the backbone's checkpoint makes it the model that the entry's run had trained.

    Args:
        bank: the mask bank.
        name: its entry.
    """

    get_logits = Wav2VecCtc.get_logits  # padded frames become blanks, as in fairseq's own CTC model
    get_normalized_probs = Wav2VecCtc.get_normalized_probs

    def __init__(self, bank: MaskBank, name: str) -> None:
        super().__init__()
        self.bank, self.name = bank, name
        info = bank.info(name)
        self.blank_weight, self.blank_mode = info.get("blank_weight", 0), info.get("blank_mode", "add")
        self.masked: Optional[MaskedModel] = None

    def load_state_dict(self, state_dict: Any, strict: bool = True, model_cfg: Any = None, args: Any = None) -> Any:
        """Takes the encoder out of a backbone's checkpoint, pre-trained or fine-tuned, and lays the entry's masks over it.

        Raises:
            ValueError: it is not the bank's backbone.
        """
        options = (
            OmegaConf.to_container(model_cfg, enum_to_str=True) if OmegaConf.is_config(model_cfg) else vars(model_cfg)
        )
        backbone = parse_checkpoint({"model": state_dict, "cfg": {"model": options}}, "the checkpoint of --path")
        self.masked = MaskedModel.load(backbone, self.bank, "the checkpoint of --path").use(self.name)

    def forward(self, source: Tensor, padding_mask: Optional[Tensor] = None, **_: Any) -> dict[str, Any]:
        """Waveforms [B, S], normalised by the dataset -> ``encoder_out`` [T, B, V] (logits), ``padding_mask`` [B, T] or None."""
        assert self.masked is not None and isinstance(self.masked.head, nn.Linear)
        head = self.masked.head
        out = self.masked.encoder(source.to(head.weight.dtype), padding_mask)
        return {"encoder_out": head(out.x).transpose(0, 1), "padding_mask": out.padding_mask}


def open_entry(path: Optional[str], name: Optional[str]) -> Optional[MaskBank]:
    """The bank of the options ``mask_bank`` and ``mask_name``, or None where neither is set.

    Raises:
        FileNotFoundError, ValueError: one is set without the other, the bank cannot be read, has no such entry, or that is no
            CTC model.
    """
    if path is None and name is None:
        return None
    if not path or not name:
        raise ValueError(
            f"`mask_bank` and `mask_name` name a file and an entry in it and must come together, but are {path!r} and {name!r}; pass "
            "--mask-bank FILE --mask-name NAME, or neither"
        )
    bank = MaskBank.open(path)
    info = bank.info(name)
    if info.get("kind", "ctc") != "ctc" or "proj.weight" not in bank.tensor_names(name):
        raise ValueError(
            f"audio_ctc decodes CTC models, but {name!r} in mask bank {path} is none (kind {info.get('kind')!r})"
        )
    return bank


def dictionary_of(symbols: list[str]) -> Dictionary:
    """fairseq's dictionary with these symbols (index = position), its four special ones in front included.

    Raises:
        ValueError: they do not begin with the special ones.
    """
    dictionary = Dictionary()
    if symbols[: dictionary.nspecial] != dictionary.symbols:
        raise ValueError(
            f"a dictionary must begin with {' '.join(dictionary.symbols)}, but begins with {' '.join(symbols[: dictionary.nspecial])}"
        )
    dictionary.symbols, dictionary.count = list(symbols), [1] * len(symbols)
    dictionary.indices = {symbol: i for i, symbol in enumerate(symbols)}
    return dictionary
