"""S3-Router through the real commands: the published ones as they stand, starts that are refused, resuming, decoding."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import Tensor

pytest.importorskip("fairseq")

import s3distill
from s3distill import compat
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.masks.state import read_masks
from tests.encoder import checkpoints
from tests.masks.students import LAYERS, write_compact_student

ROOT = Path(__file__).parents[2]
BASE_1H = ("--config-dir", "examples/wav2vec/config/finetuning", "--config-name", "base_1h")
XLSR = ("--config-dir", "examples/wav2vec/xlsr/config", "--config-name", "finetune")

# the README of S3-Router, words as they stand; {data}, {backbone} and {out} are what it leaves to the reader
_ALWAYS = (
    "task.data={data} model.w2v_path={backbone} dataset.train_subset=train dataset.valid_subset=valid hydra.run.dir={out} "
    "dataset.max_tokens_valid=800000 dataset.max_tokens=1200000 checkpoint.no_epoch_checkpoints=false "
    "checkpoint.save_interval=1000 optimization.lr=[0.00005] lr_scheduler.final_lr_scale=0.0001 "
)
_MASKS = "model._name=wav2vec_ctc_st model.fix_attn=true model.trainable_proj=true model.init_score=weight_rank "
PUBLISHED = {
    "wav2vec2": (_ALWAYS + _MASKS + "model.prune_rate=0.9", BASE_1H),
    "data2vec": (_ALWAYS + _MASKS + "model.prune_rate=0.9 task.normalize=true", BASE_1H),
    "xlsr": (
        _ALWAYS
        + _MASKS
        + "model.prune_rate=0.94 model.checkpoint_activations=true checkpoint.best_checkpoint_metric=uer",
        XLSR,
    ),
    "pruning, step 1": (_ALWAYS + "model._name=wav2vec_ctc", BASE_1H),
    "pruning, step 2": (
        _ALWAYS
        + "model._name=wav2vec_ctc_st model.prune_rate=0.3 model.init_score=weight_magnitude_with_scale "
        + "checkpoint.finetune_from_model={dense}",
        BASE_1H,
    ),
}
# a machine without a GPU, and what makes them short
CPU = {
    "common.fp16": "false",
    "distributed_training.distributed_world_size": "1",
    "common.user_dir": "s3distill",
}
SHORT = {
    "optimization.max_update": "3",
    "common.log_interval": "1",
    "dataset.num_workers": "0",
    "dataset.max_tokens": "60000",
    "model.mask_channel_length": "8",  # widths of 32 cannot hold spans of 64
}
FAMILIES: dict[str, tuple[str, dict[str, Any], bool]] = {  # model, shape, normalize
    "wav2vec2": ("wav2vec2", checkpoints.SMALL, False),
    "data2vec": ("data2vec_audio", checkpoints.SMALL, True),
    "xlsr": ("wav2vec2", checkpoints.LARGE | checkpoints.SMALL, True),
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("backbones")
    return {
        name: checkpoints.save(checkpoints.pretrained(model, shape, normalize=normalize)[0], folder / f"{name}.pt")
        for name, (model, shape, normalize) in FAMILIES.items()
    }


def published(
    name: str, data: Path, backbone: Path, out: Path, *overrides: str, dense: Path | None = None
) -> list[str]:
    """A published command in its CPU form; ``overrides`` win."""
    text, recipe = PUBLISHED[name]
    words = text.format(data=data, backbone=backbone, out=out, dense=dense).split()
    options = dict(word.split("=", 1) for word in words) | CPU | SHORT
    options |= dict(override.split("=", 1) for override in overrides)
    return ["fairseq-hydra-train", *(f"{key}={value}" for key, value in options.items()), *recipe]


def last(out: Path) -> dict[str, Any]:
    return compat.load_checkpoint(out / "checkpoints" / "checkpoint_last.pt")


def scores_of(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state["model"].items() if name.endswith(".scores")}


def logged(output: str, part: str) -> list[dict[str, str]]:
    """The lines of `train_inner`, `train` or `valid` in a log."""
    return [json.loads(line) for line in re.findall(rf"\[{part}\]\[INFO\] - (\{{.*\}})", output)]


@pytest.fixture(scope="module")
def runs(kit: Any, backbones: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """The five published commands: folder and log of each. Read only."""
    folder, done = tmp_path_factory.mktemp("published"), {}
    dense = folder / "pruning, step 1" / "checkpoints" / "checkpoint_best.pt"
    for name in PUBLISHED:
        out = folder / name.replace(", ", "_").replace(" ", "_")
        if name == "pruning, step 2":
            dense = done["pruning, step 1"][0] / "checkpoints" / "checkpoint_best.pt"
        backbone = backbones.get(name, backbones["wav2vec2"])
        done[name] = out, kit.commands.run(*published(name, kit.corpus, backbone, out, dense=dense)).succeeded().output
    return done


# ---------------------------------------------------------------- the published commands


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_published_fine_tuning(name: str, runs: dict[str, tuple[Path, str]], backbones: dict[str, Path]) -> None:
    out, log = runs[name]
    state, backbone = last(out), parse_checkpoint(compat.load_checkpoint(backbones[name]))
    assert state["optimizer_history"][-1]["num_updates"] == 3
    assert [line["num_updates"] for line in logged(log, "train_inner")] == ["1", "2", "3"]
    metric = "valid_uer" if name == "xlsr" else "valid_wer"
    assert metric in logged(log, "valid")[-1] and (out / "checkpoints" / "checkpoint_best.pt").exists()

    parsed = parse_checkpoint(state)
    ffn = {f"w2v_model.encoder.layers.{i}.{fc}" for i in range(3) for fc in ("fc1", "fc2")}
    assert set(parsed.scores) == ffn
    density = 0.94 if name == "xlsr" else 0.9
    for module, mask in read_masks(parsed).items():
        assert int((~mask).sum()) == int((1 - density) * mask.numel()), module
    assert {"w2v_encoder.proj.weight", "w2v_encoder.w2v_model.mask_emb"} <= set(state["model"])
    for key, value in backbone.encoder_state.items():
        if key != "mask_emb":
            assert torch.equal(parsed.encoder_state[key], value), f"{key} is frozen"
    assert_learned(state, 6 + 2 + 1)

    model = s3distill.load(out / "checkpoints" / "checkpoint_last.pt")
    logits = model(torch.randn(1, 8000), None).logits
    assert logits.shape[-1] == 4 + 3 and logits.isfinite().all()


def assert_learned(state: dict[str, Any], number: int) -> None:
    """The optimizer had this many parameters, each with a gradient."""
    moments = [value["exp_avg"] for value in state["last_optimizer_state"]["state"].values()]
    assert len(moments) == number and all(bool(moment.any()) for moment in moments)


@pytest.mark.slow
def test_published_pruning(runs: dict[str, tuple[Path, str]]) -> None:
    """Step 1 fine-tunes fairseq's own model with the same recipe; step 2 prunes from the weights that it found."""
    (first, first_log), (second, second_log) = runs["pruning, step 1"], runs["pruning, step 2"]
    assert re.search(r"model\._name=wav2vec_ctc: the recipe's \d+ options of wav2vec_ctc_st are left out", first_log)
    dense = compat.load_checkpoint(first / "checkpoints" / "checkpoint_best.pt")
    assert not scores_of(dense) and dense["cfg"]["model"]["_name"] == "wav2vec_ctc"
    assert "prune_rate" not in dense["cfg"]["model"]

    assert "scores of 18 masks start from the loaded weights: weight_magnitude_with_scale" in second_log
    state = last(second)
    scores = scores_of(state)
    assert len(scores) == 18
    assert_learned(state, 18 + 1)
    for name, value in scores.items():
        weight = dense["model"][name.replace(".scores", ".weight")]
        assert torch.equal(state["model"][name.replace(".scores", ".weight")], weight)
        # three updates of lr <= 5e-5 away from where they started
        assert 0 < float((value - weight).abs().max()) <= 3 * 5e-5, name
    assert all(
        float((~mask).float().mean()) == pytest.approx(0.7, abs=1e-3)
        for mask in read_masks(parse_checkpoint(state)).values()
    )
    assert torch.equal(state["model"]["w2v_encoder.proj.weight"], dense["model"]["w2v_encoder.proj.weight"])


@pytest.mark.slow
def test_masks_over_a_pruned_student(kit: Any, tmp_path: Path) -> None:
    student = write_compact_student(tmp_path / "compact.pt")
    out = tmp_path / "out"
    kit.commands.run(*published("wav2vec2", kit.corpus, student, out, "model.fix_attn=false")).succeeded()
    state = last(out)
    expected = sum(4 * (layer.attention and layer.num_heads > 0) + 2 * (layer.ffn_dim > 0) for layer in LAYERS)
    assert len(scores_of(state)) == expected == 16
    assert parse_checkpoint(state).config.layers == LAYERS
    assert (
        s3distill.load(out / "checkpoints" / "checkpoint_last.pt")(torch.randn(1, 8000), None).logits.isfinite().all()
    )


@pytest.mark.slow
def test_relative_paths_mean_what_was_typed(kit: Any, backbones: dict[str, Path], runs: Any, tmp_path: Path) -> None:
    """Hydra would change into the run's folder first."""
    out = tmp_path / "out"
    data, backbone, dense, relative_out = (
        Path(os.path.relpath(path, ROOT))
        for path in (
            kit.corpus,
            backbones["wav2vec2"],
            runs["pruning, step 1"][0] / "checkpoints" / "checkpoint_best.pt",
            out,
        )
    )
    assert not backbone.is_absolute()
    kit.commands.run(*published("pruning, step 2", data, backbone, relative_out, dense=dense)).succeeded()
    ours, theirs = scores_of(last(out)), scores_of(last(runs["pruning, step 2"][0]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items()), "it is the same run"
    assert (out / "hydra" / "config.yaml").exists()


# ---------------------------------------------------------------- decoding and evaluation


@pytest.mark.slow
def test_fairseq_generate_decodes_the_run(kit: Any, runs: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    checkpoint = runs["wav2vec2"][0] / "checkpoints" / "checkpoint_last.pt"
    command = f"fairseq-generate {kit.corpus} --user-dir s3distill --task audio_ctc --labels ltr --path {checkpoint} --cpu".split()
    options = f"--gen-subset valid --batch-size 1 --scoring s3_wer --results-path {tmp_path}".split()
    kit.commands.run(*command, *options).succeeded()
    text = (tmp_path / "generate-valid.txt").read_text()
    found = {int(i): hypothesis for i, hypothesis in re.findall(r"^H-(\d+)\t[^\t]*\t(.*)$", text, flags=re.MULTILINE)}

    model, symbols = s3distill.load(checkpoint), ["<s>", "<pad>", "</s>", "<unk>", "A", "B", "|"]
    for i in range(4):
        waveform, _ = soundfile.read(kit.corpus / "valid" / f"{i:03d}.flac", dtype="float32")
        frames = model(torch.from_numpy(waveform)[None], None).logits[0].argmax(-1).tolist()
        kept = [f for f, before in zip(frames, [None, *frames], strict=False) if f != before and f > 2]
        assert found[i].split() == [symbols[f] for f in kept]
    assert any(found.values()), "transcripts that are all empty would prove nothing"


@pytest.mark.slow
@pytest.mark.parametrize("starts", ["from a finished run", "from another run", "with nothing that learns"])
def test_eval_only_validates_once(
    kit: Any, backbones: dict[str, Path], runs: dict[str, tuple[Path, str]], tmp_path: Path, starts: str
) -> None:
    finished, log = runs["wav2vec2"]
    out, overrides = tmp_path / "out", ["model.eval_only=true", "optimization.max_update=9"]
    if starts == "from another run":
        overrides.append(f"checkpoint.finetune_from_model={finished}/checkpoints/checkpoint_last.pt")
    else:
        shutil.copytree(finished, out)
    if starts == "with nothing that learns":
        overrides += ["model.fix_mask=true", "model.trainable_proj=false", "checkpoint.reset_optimizer=true"]
    files = {path: path.read_bytes() for path in out.rglob("*.pt")}
    output = (
        kit.commands.run(*published("wav2vec2", kit.corpus, backbones["wav2vec2"], out, *overrides)).succeeded().output
    )
    assert len(logged(output, "valid")) == 1 and not logged(output, "train_inner")
    assert "eval_only: validated valid at update" in output
    assert {path: path.read_bytes() for path in out.rglob("*.pt")} == files, "weights were written"
    before, now = logged(log, "valid")[-1], logged(output, "valid")[0]
    assert {key: now[key] for key in ("valid_loss", "valid_wer", "valid_uer")} == {
        key: before[key] for key in ("valid_loss", "valid_wer", "valid_uer")
    }


# ---------------------------------------------------------------- resuming

MAX_UPDATE = 8
# what random state could spoil: SpecAugment, dropout, LayerDrop, several batches for one update
RESUMABLE = (
    f"optimization.max_update={MAX_UPDATE}",
    "optimization.update_freq=[2]",
    "optimization.lr=[0.01]",
    "checkpoint.save_interval_updates=2",
    "dataset.max_tokens=40000",
)
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "masks and head": ("wav2vec2", ()),
    "load_mask_only": ("wav2vec2", ("model.load_mask_only=true", "checkpoint.finetune_from_model={masked}")),
    "pruning, step 2": ("pruning, step 2", ()),
    # of weights that learn in half precision, fairseq does not save its float32 copy; scores are float32 themselves
    "float16": (
        "wav2vec2",
        (
            "common.fp16=true",
            "common.fp16_no_flatten_grads=true",
            "model.trainable_proj=false",
            "model.apply_mask=false",
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_resumes_to_the_same_end(
    kit: Any, backbones: dict[str, Path], runs: dict[str, tuple[Path, str]], tmp_path: Path, variant: str
) -> None:
    """The same command again, ``finetune_from_model`` and all: scores, head, optimizer and schedule, bit for bit."""
    name, overrides = VARIANTS[variant]
    masked, dense = (runs[n][0] / "checkpoints" / "checkpoint_best.pt" for n in ("wav2vec2", "pruning, step 1"))
    overrides = tuple(override.format(masked=masked) for override in overrides)

    def command(out: Path) -> list[str]:
        return published(name, kit.corpus, backbones["wav2vec2"], out, *RESUMABLE, *overrides, dense=dense)

    whole = tmp_path / "whole"
    log = kit.commands.run(*command(whole)).succeeded().output
    reference = last(whole)
    written = sorted((path for path in re.findall(r"Saving checkpoint to (\S+_\d+_\d+\.pt)", log)), key=update_of)
    assert [update_of(path) for path in written] == [2, 4, 6, 8]

    # a pipe under the name that the checkpoint of update 6 is written to holds the command inside of the write
    killed = tmp_path / "killed"
    torn = killed / "checkpoints" / f"{Path(written[2]).name}.tmp"
    torn.parent.mkdir(parents=True)
    os.mkfifo(torn)
    run = kit.commands.start(*command(killed))
    with torn.open("rb") as pipe:
        assert pipe.read(2) == b"PK"
        run.kill()
    torn.unlink()
    at_kill = last(killed)
    assert at_kill["optimizer_history"][-1]["num_updates"] == 4

    resumed = kit.commands.run(*command(killed)).succeeded()
    assert "@ 4 updates)" in resumed.output, "it did not load the checkpoint"
    assert "start from the loaded weights" not in resumed.output and "and nothing else" not in resumed.output
    state = last(killed)
    assert state["model"].keys() == reference["model"].keys()
    for key, value in reference["model"].items():
        assert torch.equal(state["model"][key], value), key
    for index, values in reference["last_optimizer_state"]["state"].items():
        for key, value in values.items():
            ours = torch.as_tensor(state["last_optimizer_state"]["state"][index][key])
            assert torch.equal(ours, torch.as_tensor(value)), f"{key} of parameter {index}"
    assert state["optimizer_history"][-1] == reference["optimizer_history"][-1]
    for key, value in scores_of(reference).items():
        assert value.dtype == torch.float32 and not torch.equal(value, at_kill["model"][key]), f"{key} learned nothing"


def update_of(path: str) -> int:
    return int(Path(path).stem.rpartition("_")[2])


@pytest.mark.slow
def test_load_mask_only_takes_the_masks_and_no_head(
    kit: Any, backbones: dict[str, Path], runs: Any, tmp_path: Path
) -> None:
    """The masks of a run over another head: lr 0, so that what was taken is what is saved."""
    masked = runs["wav2vec2"][0] / "checkpoints" / "checkpoint_last.pt"
    overrides = (
        "model.load_mask_only=true",
        f"checkpoint.finetune_from_model={masked}",
        "optimization.lr=[1e-30]",
        "common.seed=5",
    )
    log = (
        kit.commands.run(*published("wav2vec2", kit.corpus, backbones["wav2vec2"], tmp_path, *overrides))
        .succeeded()
        .output
    )
    assert "took the scores of 6 masks, and nothing else" in log
    ours, theirs = last(tmp_path)["model"], compat.load_checkpoint(masked)["model"]
    own = {"w2v_encoder.proj.weight", "w2v_encoder.proj.bias", "w2v_encoder.w2v_model.mask_emb"}
    assert {name for name, value in theirs.items() if not torch.equal(ours[name], value)} == own


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(kit: Any, backbones: dict[str, Path], tmp_path: Path) -> None:
    """With half the batches for each; a mask that differed between ranks would spoil the gradients of both."""
    # without dropout and masks over frames, which every rank draws for itself; LayerNorm knows no other utterances
    still = {f"model.{name}=0" for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop")}
    overrides = [*still, "model.apply_mask=false", "optimization.lr=[0.001]", "dataset.max_tokens=40000"]

    def command(out: str, *more: str) -> list[str]:
        words = published("xlsr", kit.corpus, backbones["xlsr"], tmp_path / out, *overrides, *more)
        return [words[0], *words[-4:], *words[1:-4]]  # more overrides follow, and must stand beside the others

    one = kit.commands.run(*command("one", "optimization.update_freq=[2]")).succeeded()
    ranks = kit.start_ranks(command("two", "optimization.update_freq=[1]"))
    for rank in ranks:
        rank.wait()
    for rank in ranks:
        rank.succeeded()
    start = logged(one.output, "train_inner")[0]["loss"], logged(ranks[0].output, "train_inner")[0]["loss"]
    assert float(start[0]) == pytest.approx(float(start[1]), rel=1e-3)
    ours, theirs = last(tmp_path / "two"), last(tmp_path / "one")
    assert ours["optimizer_history"][-1]["num_updates"] == 3
    for name, value in scores_of(theirs).items():
        assert (ours["model"][name] - value).norm() <= 1e-3 * value.norm(), name
        mask, other = (removed(v, 0.94) for v in (ours["model"][name], value))
        assert (mask != other).float().mean() <= 1e-3, name


def removed(scores: Tensor, density: float) -> Tensor:
    order = scores.abs().flatten().argsort(stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[: int((1 - density) * scores.numel())]] = True
    return mask


# ---------------------------------------------------------------- one recipe, two models; sweeps


def test_options_of_masks_are_refused_with_the_dense_model(
    kit: Any, backbones: dict[str, Path], tmp_path: Path
) -> None:
    """fairseq's own model would ignore them."""
    overrides = ("model.prune_rate=0.3", "model.fix_attn=true")
    run = kit.commands.run(
        *published("pruning, step 1", kit.corpus, backbones["wav2vec2"], tmp_path / "out", *overrides)
    )
    assert run.status not in (0, None)
    assert (
        "model.prune_rate, model.fix_attn: belongs to the model wav2vec_ctc_st, but model._name is wav2vec_ctc"
        in run.output
    )
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.slow
def test_a_sweep_trains_each_of_its_jobs(kit: Any, backbones: dict[str, Path], tmp_path: Path) -> None:
    """Each in its own folder, from the start, and with a best checkpoint of its own, though one process runs them all."""
    command = published(
        *("wav2vec2", kit.corpus, backbones["wav2vec2"], Path("gone"), "model.prune_rate=0.5,0.9"),
        *(f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=${hydra.job.num}"),
    )
    command = [word for word in command if word != "hydra.run.dir=gone"]
    command.insert(1, "--multirun")
    log = kit.commands.run(*command).succeeded().output
    for job, density in ((0, 0.5), (1, 0.9)):
        masks = read_masks(parse_checkpoint(last(tmp_path / str(job))))
        assert len(masks) == 6
        assert all(int((~m).sum()) == int((1 - density) * m.numel()) for m in masks.values())
        assert (tmp_path / str(job) / "checkpoints" / "checkpoint_best.pt").exists()
    assert [line["num_updates"] for line in logged(log, "train_inner")] == ["1", "2", "3"] * 2


# ---------------------------------------------------------------- starts that are refused


LOCAL = "distributed_training.distributed_init_method=tcp://localhost:29671"


@pytest.mark.parametrize(
    ("program", "override", "came"),
    [
        (["fairseq-hydra-train"], LOCAL, "distributed_init_method=tcp://localhost:29671"),
        (["s3distill", "train"], LOCAL, "distributed_init_method=tcp://localhost:29671"),
        (["fairseq-hydra-train"], "distributed_training.distributed_world_size=2", "distributed_world_size=2"),
        (["fairseq-hydra-train"], "common.fp16=true", "common.fp16"),
    ],
)
def test_a_start_that_needs_a_gpu(
    kit: Any, backbones: dict[str, Path], tmp_path: Path, program: list[str], override: str, came: str
) -> None:
    """Stock fairseq starts no process, trains nothing and exits with status 0."""
    out = tmp_path / "out"
    _, *arguments = published("wav2vec2", kit.corpus, backbones["wav2vec2"], out, override)
    run = kit.commands.run(*program, *arguments)
    assert run.status is not None and run.status > 0
    assert came in run.output and "there is no GPU here" in run.output and "common.fp16=false" in run.output
    assert "num. shared model params" not in run.output and not (out / "checkpoints").exists()


def refused_by_train(kit: Any, backbones: dict[str, Path], out: Path, *overrides: str, data: Path | None = None) -> str:
    """What `s3distill train` says; it must stop before fairseq starts."""
    _, *arguments = published("wav2vec2", data or kit.corpus, backbones["wav2vec2"], out, *overrides)
    run = kit.commands.run("s3distill", "train", *[a for a in arguments if not a.endswith("=LEFT_OUT")])
    assert run.status is not None and run.status > 0, run.output[-2000:]
    assert "begin training epoch" not in run.output and "num. shared model params" not in run.output
    assert not (out / "checkpoints").exists()
    return " ".join(run.output.split())


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "model.prune_rat=0.9",
            ["no option `model.prune_rat`", "did you mean model.prune_rate", "++model.prune_rat=0.9"],
        ),
        (
            "model.w2v_path=nowhere/base.pt",
            ["`model.w2v_path` must name what exists", "nowhere/base.pt", "check the path"],
        ),
        ("checkpoint.finetune_from_model=nowhere/best.pt", ["`checkpoint.finetune_from_model`", "nowhere/best.pt"]),
        ("model.w2v_path=LEFT_OUT", ["model.w2v_path", "must be given"]),
        ("dataset.train_subset=train-1h", ["train-1h.tsv", "must be a readable file"]),
    ],
)
def test_train_checks_names_and_paths(
    kit: Any, backbones: dict[str, Path], tmp_path: Path, override: str, parts: list[str]
) -> None:
    message = refused_by_train(kit, backbones, tmp_path / "out", override)
    assert all(part in message for part in parts), message[-1500:]


@pytest.mark.parametrize(
    ("folder", "name", "parts"),
    [
        ("config/s3_router", "base_2h", ["config/s3_router/base_2h.yaml does not exist", "there are base_1h, demo,"]),
        (
            "config/s3_routers",
            "base_1h",
            ["config/s3_routers/base_1h.yaml does not exist", "there is no recipe in that folder"],
        ),
    ],
)
def test_train_names_the_recipes_that_exist(
    kit: Any, backbones: dict[str, Path], tmp_path: Path, folder: str, name: str, parts: list[str]
) -> None:
    arguments = published("wav2vec2", kit.corpus, backbones["wav2vec2"], tmp_path / "out")[1:-4]
    run = kit.commands.run("s3distill", "train", *arguments, "--config-dir", folder, "--config-name", name)
    assert run.status == 2 and all(part in run.output for part in parts), run.output


def test_train_checks_the_manifests(kit: Any, backbones: dict[str, Path], tmp_path: Path) -> None:
    data = kit.write_corpus(tmp_path / "data", num_train=4, num_valid=2)
    (data / "valid" / "001.flac").unlink()
    message = refused_by_train(kit, backbones, tmp_path / "out", data=data)
    assert "valid.tsv:3" in message and "001.flac" in message and "correct the path" in message
    data = kit.write_corpus(tmp_path / "other", num_train=4, num_valid=2)
    (data / "train.ltr").write_text("A B |\n" * 3)
    message = refused_by_train(kit, backbones, tmp_path / "out", data=data)
    assert "a line for each of the 4 utterances" in message and "it has 3" in message


@pytest.mark.slow
def test_train_trains(kit: Any, backbones: dict[str, Path], runs: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    """The same run as fairseq's own command."""
    _, *arguments = published("wav2vec2", kit.corpus, backbones["wav2vec2"], tmp_path)
    kit.commands.run("s3distill", "train", *arguments).succeeded()
    ours, theirs = last(tmp_path)["model"], last(runs["wav2vec2"][0])["model"]
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.prune_rate=90"], ["`prune_rate` is the kept fraction", "90", "0.9 removes 10%"]),
        (["model.fix_mask=true", "model.trainable_proj=false"], ["nothing would be trained", "fix_mask=True"]),
        (["task.normalize=true"], ["`task.normalize`", "normalize=False", "pass task.normalize=false"]),
    ],
)
def test_options_that_are_refused(
    kit: Any, backbones: dict[str, Path], tmp_path: Path, overrides: list[str], parts: list[str]
) -> None:
    run = kit.commands.run(*published("wav2vec2", kit.corpus, backbones["wav2vec2"], tmp_path / "out", *overrides))
    assert run.status is not None and run.status > 0 and "begin training epoch" not in run.output
    assert all(part in run.output for part in parts), run.output[-2000:]
