"""Folders of `transformers`: every layer and the logits are its own, every option takes one, and broken ones are named."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("fairseq")

from omegaconf import OmegaConf

import s3distill
from s3distill import compat
from s3distill.analysis.measure import describe
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.encoder.config import EncoderConfig
from s3distill.encoder.ctc_head import NEVER, fairseq_order
from s3distill.encoder.huggingface import encoder_config
from s3distill.encoder.speech_model import SpeechModel
from s3distill.gates import GateCounts, count_parameters
from s3distill.models.ssl_student import SslStudent, SslStudentConfig
from s3distill.tasks.audio_distill import AudioDistillConfig, AudioDistillTask
from tests.encoder import folders
from tests.encoder.test_parity import TOLERANCE, error, utterances
from tests.models import labels

FAMILIES = {"wav2vec2": "wav2vec2", "hubert": "hubert", "wavlm": "wavlm", "data2vec-audio": "data2vec_audio"}
PRE_LN = [model_type for model_type in folders.MODEL_TYPES if model_type != "data2vec-audio"]
LENGTHS = [9000, 12345, 400, 4000]


@torch.no_grad()
def worst_error(loaded: SpeechModel, model: nn.Module, lengths: list[int]) -> float:
    """Our padded batch against their single utterances: every hidden state, and the logits or the output."""
    source, _ = utterances(lengths)
    source = 3 * source + 0.2
    out = loaded(source, torch.tensor(lengths))
    errors = []
    for i, length in enumerate(lengths):
        single = source[i : i + 1, :length]
        if loaded.normalize:
            single = nn.functional.layer_norm(single, (length,))
        states, result = folders.reference(model, single)
        frames = slice(0, len(result))
        assert len(states) == len(out.hidden_states)
        errors += [error(ours[i, frames], theirs) for ours, theirs in zip(out.hidden_states, states, strict=True)]
        errors.append(error((out.x if out.logits is None else out.logits)[i, frames], result))
    return max(errors)


# --- numbers


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("model_type", folders.MODEL_TYPES)
def test_every_layer_is_that_of_transformers(model_type: str, normalize: bool, tmp_path: Path) -> None:
    model = folders.build(model_type)
    loaded = s3distill.load(folders.write(tmp_path, model, normalize))
    assert (loaded.family, loaded.normalize, loaded.head) == (FAMILIES[model_type], normalize, None)
    assert worst_error(loaded, model, LENGTHS) <= TOLERANCE


@pytest.mark.parametrize("model_type", PRE_LN)
def test_every_layer_of_pre_ln_models(model_type: str, tmp_path: Path) -> None:
    model = folders.build(model_type, **folders.PRE_LN)
    loaded = s3distill.load(folders.write(tmp_path, model))
    assert loaded.encoder.config.layer_norm_first and loaded.encoder.config.extractor_mode == "layer_norm"
    assert worst_error(loaded, model, LENGTHS) <= TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_act": "relu", "conv_bias": True},
        {"hidden_act": "gelu_new", "num_conv_pos_embeddings": 15},
        {"conv_dim": [32] * 7},  # as wide as the model: fairseq has no projection there, `transformers` has
        {"conv_dim": [8, 16, 12], "conv_kernel": [10, 8, 8], "conv_stride": [5, 8, 8]},
        {"mask_time_prob": 0.0},  # then there is no mask embedding
        {"num_hidden_layers": 1, "num_attention_heads": 8},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.parametrize("model_type", ["wav2vec2", "wavlm"])
def test_other_shapes(model_type: str, options: dict, tmp_path: Path) -> None:
    model = folders.build(model_type, **options)
    assert worst_error(s3distill.load(folders.write(tmp_path, model)), model, [9000, 5000]) <= TOLERANCE


REAL_SHAPES = [
    *(pytest.param(m, {"num_hidden_layers": 4}, id=f"{m}-base") for m in folders.MODEL_TYPES),
    *(pytest.param(m, folders.LARGE | {"num_hidden_layers": 4}, id=f"{m}-large") for m in PRE_LN),
    pytest.param("data2vec-audio", {**folders.LARGE, "num_hidden_layers": 4}, id="data2vec-audio-large"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "shape"), REAL_SHAPES)
def test_every_layer_at_real_widths(model_type: str, shape: dict, record_property: Any) -> None:
    model = folders.build(model_type, shape)
    files = {"config": model.config.to_dict(), "preprocessor": {"do_normalize": True}, "vocab": None}
    parsed = parse_checkpoint({"model": model.state_dict(), "huggingface": files})
    worst = worst_error(SpeechModel(parsed), model, [16000, 9700])
    record_property("worst_error", worst)
    print(f"{model_type}: {worst:.2e}")
    assert worst <= TOLERANCE


def test_another_weight_gives_another_result(tmp_path: Path) -> None:
    for model_type in folders.MODEL_TYPES:
        model = folders.build(model_type)
        folders.write(tmp_path / model_type, model)
        with torch.no_grad():
            model.encoder.layers[1].attention.q_proj.weight.mul_(1.1)
        assert worst_error(s3distill.load(tmp_path / model_type), model, [9000]) > 10 * TOLERANCE


# --- CTC heads


@pytest.mark.parametrize("model_type", folders.MODEL_TYPES)
def test_logits_and_symbols_of_a_ctc_model(model_type: str, tmp_path: Path) -> None:
    model = folders.build(model_type, ctc=True)
    loaded = s3distill.load(folders.write(tmp_path, model, normalize=True))
    assert worst_error(loaded, model, LENGTHS) <= TOLERANCE
    # the blank is `<pad>` in `transformers` and `<s>` in fairseq, whose models these were
    assert loaded.symbols == ["<s>", "<pad>", "</s>", "<unk>", "|", "E", "T", "A"] and not loaded.pooled


@torch.no_grad()
def test_a_ctc_model_of_another_origin_is_put_into_fairseqs_order(tmp_path: Path) -> None:
    """Fine-tuned from scratch in `transformers`: letters first, `[UNK]` and the blank `[PAD]` last, more rows than tokens."""
    vocab = {"'": 1, "a": 2, "b": 3, "|": 0, "[UNK]": 4, "[PAD]": 5}
    model = folders.build("wav2vec2", ctc=True, vocab_size=7, pad_token_id=5)
    folders.write(tmp_path, model, vocab=vocab)
    loaded = s3distill.load(tmp_path)
    assert loaded.symbols == ["<s>", "<pad>", "</s>", "<unk>", "|", "'", "a", "b", "madeupword0006"]
    source, _ = utterances([9000])
    ours, theirs = loaded(source).logits[0], model(source).logits[0]
    rows = [5, None, None, 4, 0, 1, 2, 3, 6]
    for row, origin in enumerate(rows):
        expected = torch.full_like(theirs[:, 0], NEVER) if origin is None else theirs[:, origin]
        assert error(ours[:, row], expected) <= TOLERANCE
    assert not set(ours.argmax(-1).tolist()) & {1, 2}


HEAD = {"weight": torch.randn(4, 3), "bias": torch.randn(4)}


@pytest.mark.parametrize(
    ("vocab", "blank", "message"),
    [
        ({"a": 0, "b": 4}, 0, r"must number its symbols from 0 to 3, .* but has \[4\]; are the files of one model"),
        ({"a": 0, "b": 0}, 0, "but has a number twice"),
        ({"eng": {"a": 0}, "deu": {"a": 0}}, 0, r"holds several vocabularies \(eng, deu, \.\.\.\)"),
        ({"a": 0}, 4, "`pad_token_id` .* must be one of its 4 symbols, but is 4"),
        ({"a": 0}, None, "`pad_token_id` .* but is None"),
        ({"a": 0, "<pad>": 1}, 0, "the symbols of the model must differ, but its vocab.json has <pad> twice"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_named(vocab: dict, blank: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fairseq_order(HEAD, vocab, blank, "the model")


def test_the_order_of_fairseqs_own_models_is_left_alone() -> None:
    head, symbols = fairseq_order(HEAD, {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}, 0, "the model")
    assert symbols == ["<s>", "<pad>", "</s>", "<unk>"]
    assert torch.equal(head["weight"], HEAD["weight"]) and torch.equal(head["bias"], HEAD["bias"])


# --- files


@pytest.fixture(scope="module")
def ctc_model() -> nn.Module:
    return folders.build("wavlm", ctc=True)


@pytest.fixture
def folder(ctc_model: nn.Module, tmp_path: Path) -> Path:
    return folders.write(tmp_path / "wavlm-ctc", ctc_model, normalize=True)


def as_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_shards(folder: Path) -> None:
    split(folder, "model.safetensors", save_file)


def as_bin_shards(folder: Path) -> None:
    split(folder, "pytorch_model.bin", torch.save)


def split(folder: Path, name: str, save: Any, number: int = 3) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, _, suffix = name.rpartition(".")
    weight_map = {}
    for i in range(number):
        part = {key: tensors[key] for key in sorted(tensors)[i::number]}
        file = f"{stem}-{i + 1:05d}-of-{number:05d}.{suffix}"
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def old_weight_norm(folder: Path) -> None:
    """As `transformers` wrote the positional conv before torch had parametrizations."""
    tensors = load_file(folder / "model.safetensors")
    old = {
        key.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for key, value in tensors.items()
    }
    assert old.keys() != tensors.keys()
    save_file(old, folder / "model.safetensors")


def half_precision(folder: Path) -> None:
    tensors = {key: value.half() for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")


def inside_of_processor_config(folder: Path) -> None:
    contents = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"feature_extractor": contents}))
    (folder / "preprocessor_config.json").unlink()


LAYOUTS = [as_bin, as_shards, as_bin_shards, old_weight_norm, inside_of_processor_config]


@pytest.mark.parametrize("change", LAYOUTS, ids=lambda change: change.__name__)
@torch.no_grad()
def test_every_layout_of_a_folder_gives_the_same(change: Any, folder: Path) -> None:
    source, _ = utterances([9000])
    before = s3distill.load(folder)
    change(folder)
    after = s3distill.load(str(folder))
    assert torch.equal(after(source).logits, before(source).logits)
    assert (after.symbols, after.normalize) == (before.symbols, True)
    weights = sum(p.numel() for p in after.parameters())
    assert describe(folder)["checkpoint_bytes"] > 4 * weights and describe(folder)["params"]["total"] == weights


@torch.no_grad()
def test_weights_in_half_precision_are_read_as_float32(folder: Path) -> None:
    source, _ = utterances([9000])
    before = s3distill.load(folder)(source).logits
    half_precision(folder)
    model = s3distill.load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 0 < error(model(source).logits, before) < 0.01


def test_a_folder_with_other_heads_gives_its_encoder(tmp_path: Path) -> None:
    model = folders.transformers().Wav2Vec2ForPreTraining(
        folders.transformers().Wav2Vec2Config(**folders.SMALL, num_conv_pos_embeddings=16, codevector_dim=16)
    )
    loaded = s3distill.load(folders.write(tmp_path, model.eval()))
    assert loaded.head is None and worst_error(loaded, model.wav2vec2, [9000]) <= TOLERANCE
    parsed = parse_checkpoint(compat.load_checkpoint(tmp_path))
    assert any(name.startswith("transformers.quantizer.") for name in parsed.extra_state)

    speakers = folders.transformers().WavLMForXVector(
        folders.transformers().WavLMConfig(**folders.SMALL, num_conv_pos_embeddings=16, tdnn_dim=[8] * 5)
    )
    assert "feature_extractor.weight" in speakers.state_dict()
    loaded = s3distill.load(folders.write(tmp_path / "sv", speakers.eval()))
    assert loaded.head is None and worst_error(loaded, speakers.wavlm, [9000]) <= TOLERANCE


class Damage:
    """What may be wrong with a folder, by name."""

    @staticmethod
    def no_config(folder: Path) -> None:
        (folder / "config.json").unlink()

    @staticmethod
    def no_weights(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model.safetensors.part")

    @staticmethod
    def no_preprocessor(folder: Path) -> None:
        (folder / "preprocessor_config.json").unlink()

    @staticmethod
    def no_vocabulary(folder: Path) -> None:
        (folder / "vocab.json").unlink()

    @staticmethod
    def a_lost_shard(folder: Path) -> None:
        as_shards(folder)
        (folder / "model-00002-of-00003.safetensors").unlink()

    @staticmethod
    def an_old_shard(folder: Path) -> None:
        as_shards(folder)
        file = folder / "model-00002-of-00003.safetensors"
        save_file(dict(list(load_file(file).items())[:-1]), file)

    @staticmethod
    def a_map_to_elsewhere(folder: Path) -> None:
        as_shards(folder)
        folders.edit(folder, "model.safetensors.index.json", weight_map={"lm_head.bias": "../../secret.safetensors"})

    @staticmethod
    def a_truncated_file(folder: Path) -> None:
        os.truncate(folder / "model.safetensors", 20_000)

    @staticmethod
    def a_truncated_bin(folder: Path) -> None:
        as_bin(folder)
        os.truncate(folder / "pytorch_model.bin", 20_000)

    @staticmethod
    def a_pointer(folder: Path) -> None:
        (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")

    @staticmethod
    def half_a_config(folder: Path) -> None:
        os.truncate(folder / "config.json", 200)

    @staticmethod
    def a_lost_tensor(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors["wavlm.encoder.layers.1.feed_forward.output_dense.bias"]
        save_file(tensors, folder / "model.safetensors")

    @staticmethod
    def no_head(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({k: v for k, v in tensors.items() if not k.startswith("lm_head")}, folder / "model.safetensors")

    @staticmethod
    def an_unknown_tensor(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {**tensors, "wavlm.encoder.layers.1.adapter_layer.norm.bias": torch.ones(2)}, folder / "model.safetensors"
        )

    @staticmethod
    def another_size(folder: Path) -> None:
        folders.edit(folder, intermediate_size=52)

    @staticmethod
    def no_model(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save([1, 2], folder / "pytorch_model.bin")


DAMAGES = [
    (Damage.no_config, "is a folder without config.json"),
    (
        Damage.no_weights,
        r"has a config.json, but no weights: .* \(model.safetensors.part cannot be read\); was it downloaded",
    ),
    (Damage.no_preprocessor, r"no preprocessor_config.json, so it is unknown whether .* or write one that holds"),
    (Damage.no_vocabulary, r"is a CTC model \(ForCTC\), but has no vocab.json; was it downloaded completely"),
    (Damage.a_lost_shard, r"is not whole: model-00002-of-00003.safetensors \(1 of 3 files\) are not there"),
    (Damage.an_old_shard, r"is not whole: its index names .* \(1 tensors in all\), which are in none of its 3 files"),
    (Damage.a_map_to_elsewhere, "must have a `weight_map` of tensors to files beside it"),
    (Damage.a_truncated_file, r"model.safetensors cannot be read: it is corrupt or not complete \(20000 bytes"),
    (Damage.a_truncated_bin, r"pytorch_model.bin cannot be read: .* corrupt or truncated \(20000 bytes"),
    (Damage.a_pointer, "is a git-lfs pointer and not the weights themselves; run `git lfs pull`"),
    (Damage.half_a_config, "config.json is not valid JSON"),
    (Damage.a_lost_tensor, r"missing: \['encoder.layers.1.fc2.bias'\]"),
    (Damage.no_head, r"is a CTC model \(ForCTC\), but has no lm_head.weight and lm_head.bias"),
    (Damage.an_unknown_tensor, r"has encoder parameters that s3distill's encoder has not, .*adapter_layer"),
    (Damage.another_size, r"of another shape: .*'encoder.layers.0.fc1.bias: \(48,\) instead of \(52,\)'"),
    (Damage.no_model, "must hold tensors by name, but holds something else"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_broken_folder_is_named(damage: Any, message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        s3distill.load(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "whisper"},
            "type 'whisper' .* supported are wav2vec2, hubert, wavlm, data2vec-audio, s3distill",
        ),
        ({"model_type": None}, "type None"),
        ({"add_adapter": True}, "`add_adapter` = True .* must be False"),
        ({"adapter_attn_dim": 16}, "`adapter_attn_dim` = 16 .* must be None"),
        ({"layer_norm_eps": 1e-12}, "`layer_norm_eps` = 1e-12 .* must be 1e-05"),
        ({"feat_proj_layer_norm": False}, "`feat_proj_layer_norm` = False .* must be True"),
        ({"conv_pos_batch_norm": True}, "`conv_pos_batch_norm` = True"),
        ({"feat_extract_activation": "relu"}, "`feat_extract_activation` = 'relu'"),
        ({"hidden_act": "selu"}, "`hidden_act` must be one of gelu, relu, .* but `hidden_act` is 'selu'"),
        ({"num_attention_heads": 5}, r"`hidden_size` \(32\) must be a multiple of `num_attention_heads`, but .* is 5"),
        ({"conv_stride": [5, 2]}, "`conv_dim`, `conv_kernel` and `conv_stride` must be equally long"),
        ({"conv_dim": 512}, r"has a config that cannot be read \(TypeError"),
    ],
)
def test_models_that_this_encoder_is_not_are_refused(changes: dict, message: str, folder: Path) -> None:
    folders.edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        s3distill.load(folder)


def test_data2vec_needs_a_stack_of_positional_convs() -> None:
    config = {"model_type": "data2vec-audio", **folders.SMALL}
    found = encoder_config(config, "the model")
    assert (found.pos_conv_kernel, found.pos_conv_depth, found.extractor_mode) == (95, 5, "layer_norm")
    for changes in ({"num_conv_pos_embeddings": 1}, {"conv_pos_kernel_size": 1}):
        with pytest.raises(ValueError, match="must be a stack of at least 2"):
            encoder_config({**config, **changes}, "the model")


def test_what_config_json_leaves_out_is_the_default_of_transformers() -> None:
    library = folders.transformers()
    for model_type, name in folders._CLASSES.items():
        whole = getattr(library, f"{name}Config")().to_dict()
        assert encoder_config({"model_type": model_type}, "the model") == encoder_config(whole, "the model")


def test_loading_a_bin_runs_nothing(folder: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    as_bin(folder)
    torch.save({"lm_head.bias": torch.ones(1), "x": Attack()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin was refused: loading must not run code"):
        s3distill.load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_missing_mask_embedding_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders.write(tmp_path, folders.build("hubert", mask_time_prob=0.0))
    with caplog.at_level(logging.INFO):
        loaded = s3distill.load(tmp_path)
    assert "has no mask embedding" in caplog.text and not loaded.encoder.mask_emb.any()


# --- options that take a checkpoint


def wavlm_file(folder: Path) -> Path:
    torch.save(folders.released_wavlm(), folder / "WavLM.pt")
    return folder / "WavLM.pt"


def starts(tmp_path: Path) -> dict[str, Path]:
    written = {m: folders.write(tmp_path / m, folders.build(m)) for m in folders.MODEL_TYPES}
    return {**written, "WavLM.pt": wavlm_file(tmp_path)}


def state_of(path: Path) -> dict[str, Tensor]:
    return parse_checkpoint(compat.load_checkpoint(path)).encoder_state


def test_as_teacher_and_as_student(tmp_path: Path) -> None:
    for path in starts(tmp_path).values():
        task = AudioDistillTask(AudioDistillConfig(data=str(tmp_path), teacher_path=str(path), normalize=False))
        states, _ = task.teacher.hidden_states(utterances([9000])[0], None, [0, 3])
        assert states[1].shape == (1, 27, 32)
        cfg = OmegaConf.structured(
            SslStudentConfig(
                student_path=str(path), distill_layers="0,3", prune_units=["head"], normalize=False, seed=1
            )
        )
        student = SslStudent.build_model(cfg, task)
        for name, value in state_of(path).items():
            assert torch.equal(student.get_parameter(name), value), (path, name)
        assert EncoderConfig.from_json(cfg.encoder) == student.config == task.teacher.config
        out = student.train()(*utterances([9000, 5000]), target_sparsity=0.1)
        (out["predictions"][1].square().mean() + out["penalty"]).backward()
        assert student.get_parameter("encoder.layers.0.self_attn.q_proj.weight").grad.abs().sum() > 0


def test_a_teacher_that_is_normalised_otherwise_is_refused(tmp_path: Path) -> None:
    folders.write(tmp_path, folders.build("wavlm"), normalize=True)
    task = AudioDistillTask(AudioDistillConfig(data="", teacher_path=str(tmp_path), normalize=False))
    with pytest.raises(ValueError, match=r"has normalize=True.*pass task\.normalize=true"):
        _ = task.teacher


@torch.no_grad()
def test_fine_tuned_and_loaded_again(tmp_path: Path) -> None:
    """`wav2vec_ctc_st` on each: the run rebuilds without the folder, and its masks are those of the model."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dict.ltr.txt").write_text("| 1\nA 1\nB 1\n")
    for name, path in starts(tmp_path).items():
        options = {"normalize": False, "name": "wav2vec_ctc_st", "prune_rate": 0.6}
        task, model, cfg = labels.build(tmp_path / "data", path, **options)
        for key, value in state_of(path).items():
            assert torch.equal(model.w2v_encoder.w2v_model.get_parameter(key), value), (name, key)
        labels.scramble(model).eval()
        run = labels.write_run(tmp_path / f"{name}.run.pt", task, model, cfg)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        loaded = s3distill.load(run)
        assert loaded.family == FAMILIES.get(name, "wavlm")
        source, _ = utterances([9000])
        expected = model(source=source, padding_mask=None)["encoder_out"][:, 0]
        assert error(loaded(source).logits[0], expected) <= TOLERANCE


def test_stock_fairseq_says_what_to_do_with_a_folder(folder: Path) -> None:
    from fairseq import checkpoint_utils

    with pytest.raises(IsADirectoryError, match=r"is a folder, and stock fairseq reads files only.*s3distill convert"):
        checkpoint_utils.load_checkpoint_to_cpu(str(folder))


XLS_R = folders.PRE_LN | {"num_hidden_layers": 48, "num_attention_heads": 16}
COUNTED = [
    pytest.param("wavlm", {}, 94_381_936, id="wavlm-base"),
    pytest.param("wavlm", folders.LARGE | {"num_hidden_layers": 24, "conv_bias": False}, 315_453_120, id="wavlm-large"),
    pytest.param("data2vec-audio", {}, 93_164_288, id="data2vec-base"),
    pytest.param("wav2vec2", XLS_R | {"hidden_size": 1280, "intermediate_size": 5120}, 962_497_408, id="xls-r-1b"),
    pytest.param("wav2vec2", XLS_R | {"hidden_size": 1920, "intermediate_size": 7680}, 2_159_259_648, id="xls-r-2b"),
]


@pytest.mark.parametrize(("model_type", "shape", "num_parameters"), COUNTED)
def test_released_shapes_are_counted(model_type: str, shape: dict, num_parameters: int) -> None:
    """Against the model of `transformers`, without memory for either."""
    library, name = folders.transformers(), folders._CLASSES[model_type]
    options = getattr(library, f"{name}Config")(**shape)
    config = encoder_config(options.to_dict(), "the model")
    with torch.device("meta"):
        theirs = getattr(library, f"{name}Model")(options)
    counted = count_parameters(config, GateCounts.full(config))
    assert counted == sum(p.numel() for p in theirs.parameters()) == num_parameters
