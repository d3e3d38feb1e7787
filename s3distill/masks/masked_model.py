"""One backbone in memory that speaks every language of a mask bank: the masks are exchanged in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Set
from typing import Any, Self

import torch
from torch import Tensor, nn

from s3distill.encoder.checkpoint import ParsedCheckpoint
from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.positional import WeightNormConv
from s3distill.encoder.speech_model import SpeechModel, SpeechOutput
from s3distill.masks.bank import MaskBank
from s3distill.masks.checksum import backbone_checksum
from s3distill.masks.options import ENCODER, HEAD

_PREFIX = f"{ENCODER}."
_HEAD_WEIGHT = f"{HEAD}.weight"


class MaskableConv(WeightNormConv):
    """The positional convolution with a masked weight in place of g * v / ||v||, where ``effective`` is set."""

    def __init__(self, channels: int, kernel: int, groups: int) -> None:
        super().__init__(channels, kernel, groups)
        self.effective: Tensor | None
        self.register_buffer("effective", None, persistent=False)

    def dense_weight(self) -> Tensor:
        """g * v / ||v||, [C, C/groups, K]."""
        return WeightNormConv.weight.__get__(self)

    @property
    def weight(self) -> Tensor:
        return self.dense_weight() if self.effective is None else self.effective


class MaskedModel(SpeechModel):
    """A backbone with the masks, the trained tensors and the head of one bank entry at a time.

        model = s3distill.MaskedModel.load("xlsr.pt", "bank.safetensors").use("nl")
        logits = model(waveforms, lengths).logits  # [B, T, V], of a classifier [B, V]
        model.use("fr")

    A masked weight is W * mask in storage of its own, beside the backbone's W, which is never written to. What an entry
    leaves alone is the backbone's own storage.

    Attributes:
        bank: the `MaskBank`.
        name: the entry in use, or None before the first `use`.
        symbols: dictionary of its head (index = position), or None.
    """

    def __init__(
        self, config: EncoderConfig, encoder_state: dict[str, Tensor], family: str, bank: MaskBank, source: str
    ) -> None:
        nn.Module.__init__(self)  # SpeechModel would draw new weights and copy the backbone's
        bank.check_backbone(backbone_checksum(encoder_state), source)
        self.encoder = _adopt(config, encoder_state, source)
        self.head: nn.Linear | None = None
        self.gates = None
        self.symbols: list[str] | None = None
        self.normalize, self.family = False, family
        self.bank = bank
        self.name: str | None = None
        self._aside: dict[str, Tensor] = {}  # the backbone's values of parameters that hold something else
        self.eval()

    @classmethod
    def load(
        cls,
        backbone: ParsedCheckpoint | SpeechModel,
        bank: MaskBank | str | os.PathLike[str],
        source: str = "the backbone",
    ) -> MaskedModel:
        """Puts a backbone and a bank together.

        Args:
            backbone: what `s3distill.load` gave, or a parsed checkpoint; it stays as it is, its tensors are shared.
            bank: the bank or its file.
            source: what messages call the backbone.
        Raises:
            TypeError: the backbone is something else, such as a path.
            FileNotFoundError, ValueError: the bank cannot be read, or belongs to another backbone.
        """
        bank = bank if isinstance(bank, MaskBank) else MaskBank.open(bank)
        if isinstance(backbone, SpeechModel):
            return cls(backbone.encoder.config, backbone.encoder.state_dict(), backbone.family, bank, source)
        if isinstance(backbone, ParsedCheckpoint):
            return cls(backbone.config, backbone.encoder_state, backbone.family, bank, source)
        raise TypeError(f"`backbone` must be a loaded model, but is {backbone!r}; pass s3distill.load(path)")

    @property
    def names(self) -> list[str]:
        """What `use` takes."""
        return self.bank.names

    @torch.no_grad()
    def use(self, name: str) -> Self:
        """Switches to an entry, in place; where the entry is refused, nothing has changed.

        The bytes of an entry are held against their digest at its first use. What fails after the checks (no memory, a key
        press) leaves the model without a language in use, and never with half of one.

        Raises:
            ValueError: the bank has no such entry, or the entry is damaged or does not fit the backbone.
        """
        self._check_fit(name)
        self.bank.check_intact(name)
        info, entry = self.bank.info(name), _Reader(self.bank, name)
        head = entry.head(self.encoder.mask_emb)
        self.name = None
        self._exchange_weights(entry, info)
        self._mask_convs(entry)
        self.head, self.pooled = head, info.get("kind") == "classification"
        self.symbols, self.normalize = self.bank.symbols(name), info.get("normalize", False)
        self.name = name
        return self

    def _exchange_weights(self, entry: _Reader, info: Mapping[str, Any]) -> None:
        rounding = getattr(torch, info.get("weights_dtype", "float32"))
        parameters = dict(self.encoder.named_parameters())
        masked = {f"{module}.weight": module for module in entry.modules}
        changed = entry.trained | (set(masked) & set(parameters))
        if rounding != torch.float32:
            changed = set(parameters)
        self._restore(parameters, keep=changed)
        for key in changed:
            if key not in self._aside:
                own = torch.empty_like(parameters[key])
                self._aside[key], parameters[key].data = parameters[key].data, own
            dense = self._aside[key]
            value = entry.tensor(key).to(dense) if key in entry.trained else dense.to(rounding).to(dense.dtype)
            if key in masked:
                # in two steps, since a product of float and bool is a third slower on the CPU
                parameters[key].data.copy_(entry.mask(masked[key])).mul_(value)
            else:
                parameters[key].data.copy_(value)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> SpeechOutput:
        """Runs the model as `SpeechModel` does, in the language in use.

        Raises:
            RuntimeError: no language is in use.
            ValueError: see `SpeechModel.forward`.
        """
        if self.name is None:
            raise RuntimeError(
                f"a masked model must have a language, but has none yet; call .use(name), with {', '.join(self.names)}"
            )
        return super().forward(waveforms, lengths)

    def _check_fit(self, name: str) -> None:
        """Everything in the entry has its place in the encoder, of its shape, and the head has the width of its output."""
        shapes = {key: tuple(p.shape) for key, p in self.encoder.named_parameters()}
        bank, found = self.bank, list[tuple[str, tuple[int, ...]]]()
        for module in bank.module_names(name):
            key = f"{module.removeprefix(_PREFIX)}.weight"
            key = key if key in shapes or module == HEAD else f"{key}_v"
            found.append((key, bank.mask_shape(name, module)))
        for full_name in bank.tensor_names(name):
            found.append((full_name.removeprefix(_PREFIX), bank.tensor_shape(name, full_name)))
        if _HEAD_WEIGHT in bank.tensor_names(
            name
        ):  # of which the bank's header says that it fits its bias and its mask
            outputs = bank.tensor_shape(name, _HEAD_WEIGHT)[0]
            shapes |= {_HEAD_WEIGHT: (outputs, self.encoder.config.output_dim), f"{HEAD}.bias": (outputs,)}
        wrong = [
            f"{key} of shape {shape} instead of {shapes.get(key, 'nothing of that name')}"
            for key, shape in found
            if shapes.get(key) != shape
        ]
        if wrong:
            raise ValueError(
                f"{name!r} in mask bank {bank.path} does not fit the backbone: {'; '.join(wrong[:3])} ({len(wrong)} in all); "
                "pack it anew"
            )

    def _restore(self, parameters: dict[str, nn.Parameter], keep: Set[str]) -> None:
        for key in set(self._aside) - keep:
            parameters[key].data = self._aside.pop(key)

    def _mask_convs(self, entry: _Reader) -> None:
        for module_name, module in self.encoder.named_modules():
            if isinstance(module, MaskableConv):
                module.effective = None
                if module_name in entry.modules:
                    weight = module.dense_weight()
                    module.effective = weight * entry.mask(module_name).to(weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._aside = {key: fn(tensor) for key, tensor in self._aside.items()}
        return self


class _Reader:
    """One entry under the encoder's own names."""

    def __init__(self, bank: MaskBank, name: str) -> None:
        self.bank, self.name = bank, name
        self.modules = {m.removeprefix(_PREFIX) for m in bank.module_names(name) if m != HEAD}
        self.trained = {t.removeprefix(_PREFIX) for t in bank.tensor_names(name) if t.startswith(_PREFIX)}

    def tensor(self, key: str) -> Tensor:
        return self.bank.tensor(self.name, f"{_PREFIX}{key}")

    def mask(self, module: str) -> Tensor:
        return self.bank.mask(self.name, f"{_PREFIX}{module}")

    def head(self, like: Tensor) -> nn.Linear | None:
        """The entry's head, masked where it has a mask, of the type and on the device of ``like``."""
        if _HEAD_WEIGHT not in self.bank.tensor_names(self.name):
            return None
        weight, bias = (self.bank.tensor(self.name, n).float() for n in (_HEAD_WEIGHT, f"{HEAD}.bias"))
        if HEAD in self.bank.module_names(self.name):
            weight = weight * self.bank.mask(self.name, HEAD)
        head = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        head.weight, head.bias = (nn.Parameter(t.to(like), requires_grad=False) for t in (weight, bias))
        return head


def _adopt(config: EncoderConfig, state: dict[str, Tensor], source: str) -> SpeechEncoder:
    """An encoder around tensors that are there already; nothing is drawn or copied, except to make them float32."""
    with torch.device("meta"):
        encoder = SpeechEncoder(config)
        if config.pos_conv_depth == 1 and config.pos_conv_shape is None:  # of a pruned one nothing can be masked
            encoder.encoder.pos_conv[0] = MaskableConv(config.embed_dim, config.pos_conv_kernel, config.pos_conv_groups)
    encoder.load_encoder_state(state, source)  # checks names, shapes and values; copying to the meta device is nothing
    encoder.load_state_dict({name: state[name].detach().float() for name in encoder.state_dict()}, assign=True)
    _fill_constants(encoder, config)
    return encoder.requires_grad_(False)


def _fill_constants(encoder: SpeechEncoder, config: EncoderConfig) -> None:
    """Gives buffers that no checkpoint holds their values (in a pruned WavLM, which heads are left)."""
    empty = [name for name, buffer in encoder.named_buffers() if buffer.is_meta]
    if empty:
        values = dict(SpeechEncoder(config).named_buffers())
        for name in empty:
            parent, _, child = name.rpartition(".")
            setattr(encoder.get_submodule(parent), child, values[name])
