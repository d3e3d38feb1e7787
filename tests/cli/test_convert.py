"""`s3distill convert` as a user runs it: what it writes computes the same, stock fairseq takes it, nothing else is overwritten."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("fairseq")

from fairseq import checkpoint_utils

import s3distill
from s3distill import compat
from s3distill.cli.main import main
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.encoder.config import EncoderConfig, LayerConfig, uniform_layers
from s3distill.encoder.model import SpeechEncoder
from s3distill.encoder.options import config_from_options
from s3distill.encoder.teacher import Teacher
from s3distill.gates import GateSet
from tests.encoder import checkpoints, folders
from tests.encoder.test_parity import TOLERANCE, error, utterances
from tests.encoder.test_parity import reference as fairseqs
from tests.models import labels
from tests.test_load import UNEVEN, build_fine_tuning, write_compact

ROOT = Path(__file__).parents[2]


def convert(source: Path, output: Path, *options: str) -> Path:
    assert main(["convert", str(source), str(output), *options]) == 0
    return output


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["convert", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("s3distill convert: error: ")
    return lines[0]


@torch.no_grad()
def assert_same(path: Path, other: Path) -> None:
    """Both load to the same function, head and symbols included."""
    ours, theirs = s3distill.load(path), s3distill.load(other)
    assert (ours.symbols, ours.normalize, ours.pooled) == (theirs.symbols, theirs.normalize, theirs.pooled)
    assert ours.encoder.config == theirs.encoder.config
    source, lengths = utterances([9000, 5000])[0], torch.tensor([9000, 5000])
    a, b = ours(source, lengths), theirs(source, lengths)
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        assert torch.equal(x, y)
    assert (a.logits is None) == (b.logits is None) and (a.logits is None or torch.equal(a.logits, b.logits))


def released(path: Path, **options: Any) -> Path:
    torch.save(folders.released_wavlm(**options), path)
    return path


# --- to fairseq


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("model_type", ["wav2vec2", "hubert", "data2vec-audio", "wavlm"])
@torch.no_grad()
def test_stock_wav2vec_ctc_takes_a_converted_folder(model_type: str, normalize: bool, tmp_path: Path) -> None:
    """fairseq's own models with the weights of `transformers`: the same layers, and fine-tuning's options arrive."""
    model = folders.build(model_type, **folders.PRE_LN if model_type == "hubert" else {})
    folder = folders.write(tmp_path / "folder", model, normalize)
    path = convert(folder, tmp_path / "converted.pt")
    assert_same(path, folder)
    torch.load(path, weights_only=True)  # nothing but tensors and plain values: stock fairseq reads it on any torch

    options = {"mask_prob": 0.5, "mask_length": 3, "dropout": 0.15, "layerdrop": 0.25, "feature_grad_mult": 0.5}
    _, tuning = build_normalized(path, tmp_path, normalize, **options)
    stock = tuning.w2v_encoder.w2v_model.eval()
    names = {"wav2vec2": "Wav2Vec2Model", "hubert": "Wav2Vec2Model", "data2vec-audio": "Data2VecAudioModel"}
    assert type(stock).__name__ == names.get(model_type, "SslStudent")
    assert (stock.cfg.mask_prob, stock.cfg.mask_length, stock.cfg.dropout) == (0.5, 3, 0.15)
    assert (stock.cfg.encoder_layerdrop, stock.cfg.feature_grad_mult) == (0.25, 0.5)
    source, _ = utterances([9000])
    expected, x = folders.reference(model, source)
    if model_type == "wavlm":
        states = [h[0] for h in stock.extract_features(source, None)["hidden_states"]]
    else:
        states, _, got = fairseqs(stock, source)
        assert error(got, x) <= TOLERANCE
    for ours, theirs in zip(states, expected, strict=True):
        assert error(ours, theirs) <= TOLERANCE


def build_normalized(path: Path, data: Path, normalize: bool, **options: Any) -> Any:
    if not normalize:
        return build_fine_tuning(path, data, "audio_finetuning", **options)
    with pytest.raises(AssertionError, match="data normalization is the same"):
        build_fine_tuning(path, data, "audio_finetuning", **options)
    state = torch.load(path, weights_only=True)
    state["cfg"]["task"]["normalize"] = False
    torch.save(state, path)
    return build_fine_tuning(path, data, "audio_finetuning", **options)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["wav2vec2", "hubert", "data2vec-audio"])
@torch.no_grad()
def test_fairseqs_models_at_real_widths(model_type: str, tmp_path: Path, record_property: Any) -> None:
    large = folders.LARGE if model_type == "hubert" else {}
    model = folders.build(model_type, {**large, "num_hidden_layers": 2})
    path = convert(folders.write(tmp_path / "folder", model), tmp_path / "converted.pt")
    _, tuning = build_fine_tuning(path, tmp_path, "audio_finetuning")
    source, _ = utterances([16000])
    expected, x = folders.reference(model, source)
    states, _, got = fairseqs(tuning.w2v_encoder.w2v_model.eval(), source)
    worst = max(error(got, x), *(error(ours, theirs) for ours, theirs in zip(states, expected, strict=True)))
    record_property("worst_error", worst)
    print(f"{model_type}, fairseq after conversion: {worst:.2e}")
    assert worst <= TOLERANCE


STOCK_ALONE = """
import sys, torch
sys.modules["s3distill"] = None
from fairseq import tasks
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf
path, data = sys.argv[1:]
cfg = OmegaConf.structured(FairseqConfig())
OmegaConf.set_struct(cfg, False)
cfg.task = {"_name": "audio_finetuning", "data": data, "labels": "ltr", "normalize": True}
cfg.model = {"_name": "wav2vec_ctc", "w2v_path": path, "data": data, "normalize": True}
task = tasks.setup_task(cfg.task)
model = task.build_model(cfg.model).eval()
x = model.w2v_encoder.w2v_model.extract_features(torch.load(data + "/source.pt"), None, mask=False)["x"]
torch.save(x, data + "/x.pt")
"""


@pytest.mark.slow
@torch.no_grad()
def test_fairseq_without_this_plugin_takes_a_converted_hubert(tmp_path: Path) -> None:
    model = folders.build("hubert")
    path = convert(folders.write(tmp_path / "folder", model, normalize=True), tmp_path / "converted.pt")
    (tmp_path / "dict.ltr.txt").write_text("A 1\nB 1\n")
    source, _ = utterances([9000])
    torch.save(source, tmp_path / "source.pt")
    command = [sys.executable, "-c", STOCK_ALONE, str(path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert error(torch.load(tmp_path / "x.pt")[0], folders.reference(model, source)[1]) <= TOLERANCE


@pytest.mark.parametrize("pre_ln", [False, True])
@torch.no_grad()
def test_a_wavlm_file_becomes_a_student_for_every_option(pre_ln: bool, tmp_path: Path) -> None:
    shape = {"extractor_mode": "layer_norm", "layer_norm_first": True, "normalize": True} if pre_ln else {}
    source = released(tmp_path / "WavLM.pt", **shape)
    path = convert(source, tmp_path / "out" / "wavlm.pt")
    assert_same(path, source)
    parsed = parse_checkpoint(compat.load_checkpoint(path))
    assert (parsed.family, parsed.normalize) == ("ssl_student", pre_ln)
    states = [
        Teacher(parse_checkpoint(compat.load_checkpoint(p))).hidden_states(utterances([9000])[0], None, [0, 3])[0]
        for p in (path, source)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dict.ltr.txt").write_text("A 1\nB 1\n")
    _, model, _ = labels.build(tmp_path / "data", path, name="wav2vec_ctc_st", normalize=pre_ln)
    assert model.w2v_encoder.w2v_model.config.position_buckets == 320


@pytest.mark.parametrize("model_type", folders.MODEL_TYPES)
@torch.no_grad()
def test_a_ctc_folder_becomes_a_fine_tuned_model(model_type: str, tmp_path: Path) -> None:
    model = folders.build(model_type, ctc=True)
    folder = folders.write(tmp_path / "folder", model)
    path = convert(folder, tmp_path / "ctc.pt")
    (tuned,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    assert task.target_dictionary.symbols == ["<s>", "<pad>", "</s>", "<unk>", "|", "E", "T", "A"]
    source, _ = utterances([9000])
    logits = tuned.eval()(source=source, padding_mask=None)["encoder_out"][:, 0]
    expected = folders.reference(model, source)[1]
    assert error(logits, expected) <= TOLERANCE
    assert error(s3distill.load(path)(source).logits[0], expected) <= TOLERANCE

    encoder = convert(folder, tmp_path / "encoder.pt", "--encoder-only")
    assert s3distill.load(encoder).head is None
    _, fresh = build_fine_tuning(encoder, tmp_path, "audio_finetuning")
    weight = fresh.w2v_encoder.w2v_model.state_dict()["encoder.layers.2.fc1.weight"]
    assert torch.equal(weight, model.base_model.encoder.layers[2].feed_forward.intermediate_dense.weight)


def test_what_stock_fairseq_trained_stays_what_it_was(tmp_path: Path) -> None:
    for family in checkpoints.FAMILIES:
        path = checkpoints.save(checkpoints.pretrained(family, normalize=True)[0], tmp_path / f"{family}.pt")
        tuned = checkpoints.save(checkpoints.fine_tuned(family)[0], tmp_path / f"{family}_ctc.pt")
        for source in (path, tuned):
            assert_same(convert(source, tmp_path / f"{source.stem}-converted.pt"), source)
            assert_same(convert(source, tmp_path / f"{source.stem}-folder"), source)


# --- to folders


def write_gated(path: Path) -> Path:
    """A student that was not pruned yet, with prediction heads beside."""
    config = EncoderConfig.from_json(UNEVEN.to_json())
    encoder = checkpoints.fill(SpeechEncoder(config))
    gates = GateSet(config, ["head", "ffn"])
    with torch.no_grad():
        for _, _, gate in gates.all_gates():
            gate.log_alpha.copy_(torch.linspace(-3, 3, gate.num_gates))
    state = encoder.state_dict() | {f"gates.{k}": v for k, v in gates.state_dict().items()}
    state |= {"heads.linears.0.weight": torch.zeros(2, 2), "lagrangian.lambda1": torch.zeros(())}
    options = {"_name": "ssl_student", "encoder": config.to_json(), "prune_units": ["head", "ffn"]}
    compat.write_checkpoint(path, state, options, {"_name": "audio_distill", "normalize": True})
    return path


def write_pruned_wavlm(path: Path) -> Path:
    config = dataclasses.replace(
        config_from_options(folders.SMALL_CFG, "wavlm"),
        layers=(
            LayerConfig(0, 8, 10, attention=False, position_heads=()),
            LayerConfig(2, 8, 7, position_heads=(1, 3)),
            LayerConfig(1, 8, 0, ffn=False, position_heads=(2,)),
        ),
    )
    write_compact(path, config, normalize=True)
    return path


def write_masked(path: Path) -> Path:
    data = path.parent
    (data / "dict.ltr.txt").write_text("A 1\nB 1\n")
    backbone = labels.write_backbone(data / "backbone.pt", normalize=False)
    task, model, cfg = labels.build(data, backbone, name="wav2vec_ctc_st", normalize=False, prune_rate=0.6)
    labels.scramble(model)
    return labels.write_run(path, task, model, cfg)


def write_classifier(path: Path) -> Path:
    data = labels.write_corpus(path.parent)
    backbone = labels.write_backbone(data / "backbone.pt", normalize=True)
    task, model, cfg = labels.build(data, backbone, prune_rate=0.6)
    labels.scramble(model)
    return labels.write_run(path, task, model, cfg)


WRITERS = {
    "compact": lambda path: (write_compact(path), path)[1],
    "gated": write_gated,
    "wavlm": write_pruned_wavlm,
    "masked": write_masked,
    "classifier": write_classifier,
    "released": released,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_checkpoint_becomes_a_folder_that_loads(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = WRITERS[kind](tmp_path / f"{kind}.pt")
    folder = convert(path, tmp_path / "folder")
    printed = capsys.readouterr().out
    assert f"wrote {folder}: " in printed and f's3distill.load("{folder}")' in printed
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "s3distill" and str(tmp_path) not in json.dumps(config)
    assert not any(name.startswith(("heads.", "lagrangian.")) for name in load_file(folder / "model.safetensors"))
    assert_same(folder, path)
    # and on: to another folder, and back to a file
    assert_same(convert(folder, tmp_path / "second"), path)
    if kind != "classifier":
        assert_same(convert(folder, tmp_path / "back.pt"), path)


def test_a_folder_starts_a_student(tmp_path: Path) -> None:
    folder = convert(write_pruned_wavlm(tmp_path / "a.pt"), tmp_path / "folder")
    parsed = parse_checkpoint(compat.load_checkpoint(folder))
    assert parsed.config.layers[1].position_heads == (1, 3)
    _, model, _ = labels.build(*(_data(tmp_path), folder), name="wav2vec_ctc_st", normalize=True)
    assert model.w2v_encoder.w2v_model.config == parsed.config


def _data(folder: Path) -> Path:
    (folder / "dict.ltr.txt").write_text("A 1\nB 1\n")
    return folder


def test_a_head_for_utterances_has_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_classifier(tmp_path / "run.pt")
    assert "pass --encoder-only, or a folder's name as OUT" in refused(capsys, path, tmp_path / "out.pt")
    assert s3distill.load(convert(path, tmp_path / "out.pt", "--encoder-only")).head is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "has format_version 2 in its config.json, but this s3distill reads 1"),
        ({"family": "bert"}, "`family` in config.json .* must be one of wav2vec2, .*, but is 'bert'"),
        ({"head": {"kind": "ctc"}}, "has a head by its config.json, but no head.weight and head.bias"),
        ({"encoder": {"num_experts": 2}}, "has a config that cannot be read|unknown keys"),
    ],
)
def test_a_damaged_folder_is_named(changes: dict, message: str, tmp_path: Path) -> None:
    write_compact(tmp_path / "a.pt")
    folder = convert(tmp_path / "a.pt", tmp_path / "folder")
    folders.edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        s3distill.load(folder)


# --- writing


def test_what_it_wrote_is_replaced_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, other = tmp_path / "a.pt", tmp_path / "b.pt"
    write_compact(source)
    write_compact(other, dataclasses.replace(UNEVEN, layers=uniform_layers(1, 2, 6, 8)))
    for output in (tmp_path / "out.pt", tmp_path / "out"):
        convert(other, output)
        convert(source, output)
        assert_same(output, source)
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")

    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "config.json").write_text("{}")
    mixed = convert(source, tmp_path / "mixed")
    (mixed / "README.md").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "text.pt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for output in (notes, mixed, tmp_path / "file", tmp_path / "text.pt", other, tmp_path / "link"):
        before = _contents(tmp_path)
        assert "is there already and" in refused(capsys, source, output)
        assert _contents(tmp_path) == before


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_bad_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.pt"
    write_compact(source)
    assert "OUT must be another place than IN" in refused(capsys, source, tmp_path / "." / "a.pt")
    assert "OUT must be NAME.pt" in refused(capsys, source, tmp_path / "a.safetensors")
    assert "gone.pt does not exist; check the path" in refused(capsys, tmp_path / "gone.pt", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("name", ["out.pt", "out"])
@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_leaves_what_was_there(
    name: str, existed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "a.pt", tmp_path / name
    write_compact(source)
    if existed:
        convert(source, output)
    before = _contents(tmp_path)

    def fail(*values: Any, **_: Any) -> None:
        Path(values[1]).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr("s3distill.export.folder.save_file", fail)
    assert main(["convert", str(source), str(output)]) == 2
    assert _contents(tmp_path) == before and not list(tmp_path.glob(".*")) and output.exists() == existed


def test_a_source_that_is_not_whole_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("encoder.layers.0.fc1.bias", None), ("encoder.layers.2.fc1.weight", float("nan"))):
        path = tmp_path / "a.pt"
        write_compact(path)
        state = torch.load(path, weights_only=True)
        if value is None:
            del state["model"][name]
        else:
            state["model"][name].fill_(value)
        torch.save(state, path)
        for output in ("out.pt", "out"):
            assert name in refused(capsys, path, tmp_path / output)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_tensors_that_share_memory_are_written_whole(tmp_path: Path) -> None:
    """A state whose tensors are views of one buffer, as FSDP and some tools save them."""
    path = tmp_path / "a.pt"
    write_compact(path)
    state = torch.load(path, weights_only=True)
    flat = torch.cat([v.flatten() for v in state["model"].values()])
    views: dict[str, Tensor] = {}
    start = 0
    for name, value in state["model"].items():
        views[name] = flat[start : start + value.numel()].view(value.shape)
        start += value.numel()
    torch.save({**state, "model": views}, tmp_path / "shared.pt")
    folder = convert(tmp_path / "shared.pt", tmp_path / "folder")
    assert_same(folder, path)
    assert (folder / "model.safetensors").stat().st_size < 2 * 4 * flat.numel()


def test_inspect_shows_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = convert(write_pruned_wavlm(tmp_path / "a.pt"), tmp_path / "folder")
    capsys.readouterr()
    assert main(["inspect", str(folder), "--no-rtf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["checkpoint_bytes"] == (folder / "model.safetensors").stat().st_size
    assert report["params"]["encoder"] == sum(report["breakdown"]["params"].values())
    assert report["breakdown"]["params"]["position_bias"] == 320 * 4
