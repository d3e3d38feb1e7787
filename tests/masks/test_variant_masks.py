"""Connection masks over every variant of the encoder: one mask per weight, whoever uses it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from s3distill import compat
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.speech_model import SpeechModel
from s3distill.masks.bank import MaskBank
from s3distill.masks.checksum import backbone_checksum
from s3distill.masks.compact import bake_compact
from s3distill.masks.masked_model import MaskedModel
from s3distill.masks.network import MaskedNetwork
from s3distill.masks.options import MaskOptions
from s3distill.masks.state import adopt_state, baked, network_of
from tests.encoder.variant_configs import PLAIN, VARIANTS, changed, make_batch
from tests.masks.banks import make_backbone, make_entry

every_variant = pytest.mark.parametrize("name", list(VARIANTS))
EVERYTHING = {"no_prune_proj": False, "no_prune_extractor": False, "no_prune_pos": False}


def network(config: EncoderConfig, **options: Any) -> MaskedNetwork:
    torch.manual_seed(0)
    made = MaskedNetwork(config, 7)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    made.add_masks(MaskOptions(prune_rate=0.5, **options))
    return made.eval()


@every_variant
@torch.no_grad()
def test_every_weight_has_one_mask_and_baking_it_in_changes_nothing(name: str) -> None:
    made = network(VARIANTS[name], **EVERYTHING)
    masked = set(made.masked_modules())
    left_out = {"w2v_model.encoder.time_reduction"}
    left_out |= {n for n, m in made.named_modules() if isinstance(m, nn.Conv1d) and m.groups == m.in_channels > 1}
    left_out |= {n for n, _ in made.named_modules() if n.endswith("grep_linear")}
    weights = {n.removesuffix(".weight") for n, p in made.named_parameters() if p.dim() > 1 and n.endswith(".weight")}
    weights |= {n.removesuffix(".weight_v") for n, _ in made.named_parameters() if n.endswith(".weight_v")}
    present = {n for n in weights - left_out if "relative_attention_bias" not in n}
    assert masked == {n for n in present if made.get_parameter(f"{n}.scores").numel()} != set()
    source, padding_mask = make_batch([1200, 900])
    before = made(source, padding_mask)[0]
    again, dense, compact = copy.deepcopy(made), copy.deepcopy(made), network(VARIANTS[name], mask_pattern="rows")
    dense.bake()
    assert not dense.masked_modules()
    # the positional convolution becomes g * v / ||v|| again, which rounds
    torch.testing.assert_close(dense(source, padding_mask)[0], before, rtol=1e-5, atol=1e-5)
    rows = compact(source, padding_mask)[0]
    assert bake_compact(compact) > 0
    torch.testing.assert_close(compact(source, padding_mask)[0], rows, rtol=1e-4, atol=1e-5)
    # a mask closed altogether is seen, in all layers that have its weight
    linear = next(n for n in again.masked_modules() if n.endswith("v_proj"))
    again.get_submodule(linear).weight.zero_()
    assert not torch.allclose(again(source, padding_mask)[0], before, atol=1e-4)


@every_variant
def test_scores_learn_and_come_back_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    made = network(VARIANTS[name], **EVERYTHING)
    source, padding_mask = make_batch([1200, 900])
    made.train()(source, padding_mask)[0].square().sum().backward()
    for module_name, module in made.masked_modules().items():
        assert module.scores.grad is not None and bool((module.scores.grad != 0).any()), module_name
    expected = made.eval()(source, padding_mask)[0]
    nested = {"model": {"_name": "ssl_student", "encoder": VARIANTS[name].to_json()}, "task": {"normalize": False}}
    options = {"_name": "wav2vec_ctc_st", "prune_rate": 0.5, **EVERYTHING, "w2v_args": nested}
    state = {f"w2v_encoder.{key}": value for key, value in made.state_dict().items()}
    path = tmp_path / "run.pt"
    compat.write_checkpoint(path, state, options, {"_name": "audio_ctc", "normalize": False})
    parsed = parse_checkpoint(compat.load_checkpoint(path))
    assert parsed.config == VARIANTS[name]
    assert torch.equal(network_of(parsed)(source, padding_mask)[0], expected)
    plain = baked(parsed)
    assert not plain.scores
    lengths = (~padding_mask).sum(1)
    torch.testing.assert_close(SpeechModel(plain)(source, lengths).logits, expected, rtol=1e-4, atol=1e-5)
    adopt_state(network(VARIANTS[name], **EVERYTHING), made.state_dict())


def test_layers_that_share_weights_keep_one_fraction() -> None:
    options = MaskOptions(layerwise_prune_rate=(0.5, 0.5, 0.7, 0.7), fix_attn=False)
    rules = options.rules(changed(shared="all", shared_group=2))
    assert {name.split(".")[3]: rule.density for name, rule in rules.items()} == {"0": 0.5, "2": 0.7}
    with pytest.raises(ValueError, match=r"`layerwise_prune_rate`.* is 0.5 for layer 0 and 0.7 for layer 2; give both"):
        options.rules(changed(shared="attention"))
    # where the attention is left alone, what its layers say is of no account
    only_ffn = MaskOptions(layerwise_prune_rate=(0.5, 0.5, 0.7, 0.7), fix_attn=True)
    assert len(only_ffn.rules(changed(shared="attention"))) == 8
    assert len(only_ffn.rules(PLAIN)) == 8


@pytest.mark.parametrize(
    "name", ["everything_shared_windowed", "everything_reused", "everything_linformer", "pointwise"]
)
@torch.no_grad()
def test_a_bank_lies_over_a_variant(name: str, tmp_path: Path) -> None:
    config = VARIANTS[name]
    backbone = make_backbone(0, config)
    modules = tuple(MaskOptions(prune_rate=0.5, **EVERYTHING).rules(config))
    entry = make_entry("nl", 1, backbone, modules)
    path = tmp_path / "bank.safetensors"
    size = sum(t.numel() for t in backbone.encoder_state.values())
    bank = MaskBank.create(path, backbone_checksum(backbone.encoder_state), size, [entry])
    model = MaskedModel.load(backbone, bank).use("nl")
    dense = MaskedNetwork(config, len(model.symbols))
    state = {f"w2v_model.{key}": value for key, value in backbone.encoder_state.items()} | entry.tensors
    for module, mask in entry.masks.items():
        if f"{module}.weight" in state:
            state[f"{module}.weight"] = state[f"{module}.weight"] * mask
    dense.load_state_dict(state)
    conv = dense.w2v_model.encoder.pos_conv[0]
    weight = conv.weight * entry.masks["w2v_model.encoder.pos_conv.0"]
    conv.weight_v.copy_(weight)
    conv.weight_g.copy_(weight.norm(dim=(0, 1), keepdim=True))
    source, padding_mask = make_batch([1200, 900])
    expected = dense.eval()(source, padding_mask)[0]
    logits = model(source, (~padding_mask).sum(1)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
