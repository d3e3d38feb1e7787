"""`MaskedModel`: every entry of a bank is the dense model that it stands for, and switching leaves no trace."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s3distill.encoder.checkpoint import ParsedCheckpoint
from s3distill.encoder.config import LayerConfig
from s3distill.encoder.speech_model import SpeechModel
from s3distill.masks.bank import MaskBank
from s3distill.masks.checksum import backbone_checksum
from s3distill.masks.masked_model import MaskedModel
from s3distill.masks.pack import dense_state, entry_state
from tests.masks.banks import CONFIG, FFN, KINDS, NUM_PARAMETERS, SYMBOLS, make_backbone, make_entry

BACKBONE = make_backbone()
TRAINED = ("mask_emb", "layer_norm.weight", "encoder.layers.0.fc1.bias", "encoder.layers.1.self_attn.q_proj.weight")
ENTRIES = {
    "nl": make_entry("nl", 1),
    "fr": make_entry("fr", 2, modules=KINDS, trained=TRAINED),
    "half": make_entry("half", 3, modules=KINDS[2:], dtype=torch.float16),
    "brain": make_entry(
        "brain", 4, trained=("encoder.pos_conv.0.weight_g", "encoder.pos_conv.0.weight_v"), dtype=torch.bfloat16
    ),
    "rows": make_entry("rows", 5, modules=KINDS, pattern="rows"),
    "loud": make_entry("loud", 6, normalize=True, symbols=None),
    "class": make_entry("class", 7, kind="classification"),
}


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> MaskBank:
    path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    return MaskBank.create(path, backbone_checksum(BACKBONE.encoder_state), NUM_PARAMETERS, list(ENTRIES.values()))


@pytest.fixture
def model(bank: MaskBank) -> MaskedModel:
    return MaskedModel.load(BACKBONE, bank)


def dense_model(name: str) -> SpeechModel:
    """The slow way: the entry's masks multiplied into a checkpoint, and that loaded."""
    entry = ENTRIES[name]
    state = dense_state(entry_state(BACKBONE, entry), entry.masks)
    return SpeechModel(
        ParsedCheckpoint(
            family="wav2vec2",
            config=CONFIG,
            encoder_state={k.removeprefix("w2v_model."): v for k, v in state.items() if k.startswith("w2v_model.")},
            head_state={k.removeprefix("proj."): v for k, v in state.items() if k.startswith("proj.")},
            normalize=entry.info["normalize"],
            symbols=entry.symbols,
        )
    )


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4000, generator=generator), torch.tensor([4000, 2500, 3111])


def weights_of(model: SpeechModel) -> Iterator[tuple[str, Tensor]]:
    """Everything that an output depends on."""
    for name, parameter in model.encoder.named_parameters():
        if not name.startswith("encoder.pos_conv.0.weight_"):
            yield name, parameter
    yield "pos_conv", model.encoder.encoder.pos_conv[0].weight
    assert model.head is not None
    yield "head.weight", model.head.weight
    yield "head.bias", model.head.bias


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_is_the_dense_model_that_it_stands_for(name: str, model: MaskedModel) -> None:
    model.use(name)
    expected = dense_model(name)
    for (key, mine), (_, theirs) in zip(weights_of(model), weights_of(expected), strict=True):
        if key == "pos_conv":  # written as g * v / ||v||, which rounds
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(mine, theirs), key
    waveforms, lengths = batch()
    with torch.no_grad():
        out, other = model(waveforms, lengths), expected(waveforms, lengths)
    torch.testing.assert_close(out.x, other.x, rtol=1e-5, atol=1e-5)
    assert out.logits is not None and other.logits is not None
    logits = other.logits
    if name == "class":  # the mean over valid frames, one utterance at a time
        frames = CONFIG.num_frames(lengths).tolist()
        logits = torch.stack([logits[i, :n].mean(0) for i, n in enumerate(frames)])
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-4)
    assert model.symbols == ENTRIES[name].symbols and model.normalize == ENTRIES[name].info["normalize"]


def test_masked_weights_are_those_of_the_run_bit_by_bit(model: MaskedModel) -> None:
    """Positional convolution included: here the effective weight is held, not g and v."""
    for name in ("fr", "rows", "half"):
        model.use(name)
        conv, state = model.encoder.encoder.pos_conv[0], BACKBONE.encoder_state
        dtype = torch.float16 if name == "half" else torch.float32
        g, v = (state[f"encoder.pos_conv.0.weight_{x}"].to(dtype).float() for x in "gv")
        assert torch.equal(
            conv.weight, torch._weight_norm(v, g, 2) * ENTRIES[name].masks["w2v_model.encoder.pos_conv.0"]
        )
        fc1 = state["encoder.layers.1.fc1.weight"].to(dtype).float() * ENTRIES[name].masks[FFN[2]]
        assert torch.equal(model.encoder.encoder.layers[1].fc1.weight, fc1)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(list(ENTRIES)), min_size=1, max_size=6))
def test_switching_leaves_no_trace(bank: MaskBank, names: list[str]) -> None:
    model = MaskedModel.load(BACKBONE, bank)
    before = {k: v.clone() for k, v in BACKBONE.encoder_state.items()}
    for name in names:
        assert model.use(name) is model and model.name == name
    fresh = MaskedModel.load(BACKBONE, bank).use(names[-1])
    for (key, mine), (_, theirs) in zip(weights_of(model), weights_of(fresh), strict=True):
        assert torch.equal(mine, theirs), key
    assert model.pooled == fresh.pooled == (names[-1] == "class")
    assert model.symbols == fresh.symbols and model.normalize == fresh.normalize
    assert all(torch.equal(BACKBONE.encoder_state[k], v) for k, v in before.items()), "the backbone was written to"


def test_languages_differ_and_return(model: MaskedModel) -> None:
    waveforms, lengths = batch()
    with torch.no_grad():
        first, other, again = (model.use(name)(waveforms, lengths).logits for name in ("nl", "fr", "nl"))
    assert torch.equal(first, again) and (first - other).abs().max() > 0.1


def test_every_mask_of_an_entry_counts(bank: MaskBank, tmp_path: Path) -> None:
    """Closing one module more must change the output: a mask that is read and not used would be seen here."""
    waveforms, lengths = batch()
    entry = ENTRIES["fr"]
    with torch.no_grad():
        expected = MaskedModel.load(BACKBONE, bank).use("fr")(waveforms, lengths).logits
        for i, module in enumerate(KINDS):
            masks = {**entry.masks, module: torch.zeros_like(entry.masks[module])}
            closed = [dataclasses.replace(entry, masks=masks)]
            other = MaskBank.create(tmp_path / str(i), bank.checksum, NUM_PARAMETERS, closed)
            changed = MaskedModel.load(BACKBONE, other).use("fr")(waveforms, lengths).logits
            assert (changed - expected).abs().max() > 1e-4, module


def test_masks_are_exchanged_in_place_and_the_rest_is_the_backbones_own(model: MaskedModel) -> None:
    def places(masked: bool) -> dict[str, int]:
        keys = {f"{m.removeprefix('w2v_model.')}.weight" for m in FFN} | {"mask_emb"}
        return {k: p.data_ptr() for k, p in model.encoder.named_parameters() if (k in keys) is masked}

    model.use("nl")
    own, shared = places(True), places(False)
    assert all(BACKBONE.encoder_state[k].data_ptr() == pointer for k, pointer in shared.items())
    assert all(BACKBONE.encoder_state[k].data_ptr() != pointer for k, pointer in own.items())
    model.use("loud")
    assert places(True) == own and places(False) == shared
    model.use("half")
    model.use("nl")
    assert places(False) == shared


def test_a_loaded_model_is_a_backbone_too(bank: MaskBank) -> None:
    loaded = SpeechModel(BACKBONE)
    model = MaskedModel.load(loaded, bank).use("nl")
    reference = MaskedModel.load(BACKBONE, bank).use("nl")
    waveforms, lengths = batch()
    with torch.no_grad():
        before = loaded(waveforms, lengths).x
        assert torch.equal(model(waveforms, lengths).logits, reference(waveforms, lengths).logits)
        model.use("fr")
        assert torch.equal(loaded(waveforms, lengths).x, before)


def test_a_backbone_in_half_precision_is_read(tmp_path: Path) -> None:
    half = dataclasses.replace(BACKBONE, encoder_state={k: v.half() for k, v in BACKBONE.encoder_state.items()})
    bank = MaskBank.create(tmp_path / "bank", backbone_checksum(half.encoder_state), NUM_PARAMETERS, [ENTRIES["nl"]])
    model = MaskedModel.load(half, bank).use("nl")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(*batch()).logits.isfinite().all()


def test_padding_never_changes_the_logits(model: MaskedModel) -> None:
    waveforms, lengths = batch()
    with torch.no_grad():
        for name in ("fr", "loud", "class"):
            model.use(name)
            together = model(waveforms, lengths).logits
            for i, length in enumerate(lengths.tolist()):
                alone = model(waveforms[i : i + 1, :length]).logits[0]
                torch.testing.assert_close(
                    together[i] if name == "class" else together[i, : len(alone)], alone, rtol=1e-4, atol=1e-4
                )


def test_it_can_be_moved_and_then_switched(model: MaskedModel, bank: MaskBank) -> None:
    model.use("fr").double()
    fresh = MaskedModel.load(BACKBONE, bank)
    waveforms, lengths = batch()
    with torch.no_grad():
        for name in ("nl", "fr", "half"):
            moved, plain = model.use(name)(waveforms.double(), lengths), fresh.use(name)(waveforms, lengths)
            assert moved.logits.dtype == torch.float64
            torch.testing.assert_close(moved.logits.float(), plain.logits, rtol=1e-4, atol=1e-4)


def test_a_pruned_wavlm_keeps_its_heads(tmp_path: Path) -> None:
    """Which heads are left stands in its config, not among its weights."""
    layers = (LayerConfig(1, 8, 24, position_heads=(1,)), LayerConfig(2, 8, 24, position_heads=(0, 1)))
    config = dataclasses.replace(CONFIG, layers=layers, position_buckets=8, position_max_distance=16, position_heads=2)
    backbone = make_backbone(0, config)
    entry = make_entry("nl", backbone=backbone)
    bank = MaskBank.create(tmp_path / "bank", backbone_checksum(backbone.encoder_state), NUM_PARAMETERS, [entry])
    state = dense_state(entry_state(backbone, entry), entry.masks)
    encoder_state = {k.removeprefix("w2v_model."): v for k, v in state.items() if k.startswith("w2v_model.")}
    expected = SpeechModel(dataclasses.replace(backbone, encoder_state=encoder_state))
    with torch.no_grad():
        assert torch.equal(MaskedModel.load(backbone, bank).use("nl")(*batch()).x, expected(*batch()).x)


def test_an_entry_without_masks_or_head_is_a_language_too(tmp_path: Path) -> None:
    whole = make_entry("de")
    bare = dataclasses.replace(whole, tensors={}, symbols=None)
    probe = dataclasses.replace(whole, name="probe", masks={})
    bank = MaskBank.create(tmp_path / "bank", backbone_checksum(BACKBONE.encoder_state), NUM_PARAMETERS, [bare, probe])
    model = MaskedModel.load(BACKBONE, bank)
    assert model.use("de")(*batch()).logits is None
    plain = SpeechModel(BACKBONE)
    with torch.no_grad():
        assert torch.equal(model.use("probe")(*batch()).x, plain(*batch()).x)


# --- refusals


def test_another_backbone_is_refused(bank: MaskBank) -> None:
    with pytest.raises(
        ValueError, match=r"belongs to the backbone with checksum .* but big\.pt has .*masks mean nothing"
    ):
        MaskedModel.load(make_backbone(1), bank, "big.pt")
    touched = dict(BACKBONE.encoder_state)
    touched["encoder.layers.1.final_layer_norm.bias"] = touched["encoder.layers.1.final_layer_norm.bias"] + 1e-3
    with pytest.raises(ValueError, match="belongs to the backbone with checksum"):
        MaskedModel.load(dataclasses.replace(BACKBONE, encoder_state=touched), bank.path)


def test_a_path_is_no_backbone(bank: MaskBank) -> None:
    with pytest.raises(
        TypeError, match=r"`backbone` must be a loaded model, but is 'xlsr\.pt'; pass s3distill\.load\(path\)"
    ):
        MaskedModel.load("xlsr.pt", bank)  # type: ignore[arg-type]


def test_a_language_must_be_chosen_and_known(model: MaskedModel) -> None:
    assert model.names == list(ENTRIES) and model.name is None
    with pytest.raises(RuntimeError, match=r"has none yet; call \.use\(name\), with nl, fr, half"):
        model(*batch())
    model.use("nl")
    before = [t.clone() for _, t in weights_of(model)]
    with pytest.raises(ValueError, match=r"has no 'xx'; it has nl, fr, half"):
        model.use("xx")
    assert model.name == "nl" and all(torch.equal(a, b) for a, (_, b) in zip(before, weights_of(model), strict=True))


@pytest.mark.parametrize(
    ("masks", "tensors", "message"),
    [
        (
            {FFN[0]: torch.ones(16, 24, dtype=torch.bool)},
            {},
            r"layers\.0\.fc1\.weight of shape \(16, 24\) instead of \(24, 16\)",
        ),
        (
            {"w2v_model.encoder.layers.7.fc1": torch.ones(24, 16, dtype=torch.bool)},
            {},
            "instead of nothing of that name",
        ),
        (
            {FFN[0]: torch.ones(24, 16, dtype=torch.bool)},
            {"w2v_model.mask_emb": torch.ones(3)},
            r"mask_emb of shape \(3,\)",
        ),
    ],
)
def test_an_entry_that_does_not_fit_changes_nothing(
    masks: dict[str, Tensor], tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    wrong = dataclasses.replace(make_entry("bad"), masks=masks, tensors=tensors, symbols=None)
    bank = MaskBank.create(
        tmp_path / "bank", backbone_checksum(BACKBONE.encoder_state), NUM_PARAMETERS, [ENTRIES["nl"], wrong]
    )
    message = rf"'bad' in mask bank .* does not fit the backbone: .*{message}"
    assert_refused_without_a_trace(MaskedModel.load(BACKBONE, bank).use("nl"), message)


HEAD = {"proj.weight": torch.ones(7, 12), "proj.bias": torch.ones(7)}


@pytest.mark.parametrize(
    ("masks", "tensors", "message"),
    [
        ({}, HEAD, r"proj\.weight of shape \(7, 12\) instead of \(7, 16\)"),
        ({"proj": torch.ones(7, 16, dtype=torch.bool)}, {}, "proj.weight of shape .* instead of nothing of that name"),
        ({"w2v_model.encoder.layers.0.fc1.weight": torch.ones(2, 2, dtype=torch.bool)}, {}, "nothing of that name"),
    ],
)
def test_a_head_that_does_not_fit_changes_nothing(
    masks: dict[str, Tensor], tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    """It comes last in an entry, but must be looked at before the first weight is exchanged."""
    entry = make_entry("bad", 9)
    own = (
        {}
        if "proj" in masks
        else {"proj.weight": entry.tensors["proj.weight"], "proj.bias": entry.tensors["proj.bias"]}
    )
    tensors = {"w2v_model.mask_emb": entry.tensors["w2v_model.mask_emb"], **own, **tensors}
    wrong = dataclasses.replace(entry, masks=entry.masks | masks, tensors=tensors)
    bank = MaskBank.create(
        tmp_path / "bank", backbone_checksum(BACKBONE.encoder_state), NUM_PARAMETERS, [ENTRIES["nl"], wrong]
    )
    assert_refused_without_a_trace(MaskedModel.load(BACKBONE, bank).use("nl"), rf"'bad' .*does not fit.* {message}")


def assert_refused_without_a_trace(model: MaskedModel, message: str) -> None:
    before = [t.clone() for _, t in weights_of(model)]
    with pytest.raises(ValueError, match=message):
        model.use("bad")
    assert model.name == "nl" and model.symbols == SYMBOLS
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, weights_of(model), strict=True))


def test_a_damaged_entry_changes_nothing(tmp_path: Path) -> None:
    bank = MaskBank.create(
        tmp_path / "bank",
        backbone_checksum(BACKBONE.encoder_state),
        NUM_PARAMETERS,
        [ENTRIES["nl"], make_entry("bad", 9)],
    )
    contents = bytearray(bank.path.read_bytes())
    mask = bank._handle.get_tensor(f"bad/mask/{FFN[1]}").numpy().tobytes()
    assert contents.count(mask) == 1
    contents[contents.index(mask)] ^= 8
    bank.path.write_bytes(contents)
    model = MaskedModel.load(BACKBONE, MaskBank.open(bank.path)).use("nl")
    assert_refused_without_a_trace(model, r"'bad' in mask bank .* is damaged: its bytes must be those that were packed")


def test_a_switch_that_is_interrupted_leaves_no_half_language(
    model: MaskedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it happens; the backbone is whole, so the next switch gives a whole language."""
    backbone = {k: v.clone() for k, v in BACKBONE.encoder_state.items()}
    expected = [t.clone() for _, t in weights_of(model.use("fr"))]
    empty_like, calls = torch.empty_like, iter(range(100))

    def fail_once(tensor: Tensor) -> Tensor:
        if next(calls) == 5:
            raise MemoryError
        return empty_like(tensor)

    model.use("nl")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch, "empty_like", fail_once)
        model.use("half")
    with pytest.raises(RuntimeError, match=r"has none yet; call \.use\(name\)"):
        model(*batch())
    model.use("fr")
    assert all(torch.equal(a, b) for a, (_, b) in zip(expected, weights_of(model), strict=True))
    assert all(torch.equal(backbone[k], v) for k, v in BACKBONE.encoder_state.items())


_WITHOUT_FAIRSEQ = """
import sys
sys.modules.update(fairseq=None, omegaconf=None, hydra=None)
import torch, s3distill
from s3distill.masks.masked_model import MaskedModel
model = MaskedModel.load(s3distill.load(sys.argv[1]), sys.argv[2]).use("nl")
print(tuple(model(torch.randn(1, 4000)).logits.shape), model.symbols[-1] == "\u8bed")
"""


def test_it_needs_no_fairseq(bank: MaskBank, tmp_path: Path) -> None:
    options = {
        **{"_name": "wav2vec2", "encoder_layers": 2, "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 24},
        **{"encoder_attention_heads": 2, "conv_feature_layers": "[(8, 10, 5), (8, 8, 4), (8, 4, 4)]", "conv_pos": 8},
        **{"conv_pos_groups": 2, "extractor_mode": "layer_norm", "conv_bias": True, "layer_norm_first": True},
    }
    torch.save({"cfg": {"model": options, "task": {}}, "model": BACKBONE.encoder_state}, tmp_path / "backbone.pt")
    command = [sys.executable, "-c", _WITHOUT_FAIRSEQ, tmp_path / "backbone.pt", bank.path]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 49, 7) True"
