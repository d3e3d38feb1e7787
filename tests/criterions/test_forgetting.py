"""EWC and task alignment inside of `ctc_distill`: values, gradients, padding, what is saved, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq")

from fairseq import tasks
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from omegaconf import OmegaConf

import s3distill
from s3distill import compat
from s3distill.analysis.fisher import estimate_fisher, find_utterances
from s3distill.analysis.fisher_file import read_fisher, write_fisher
from s3distill.cli.main import main
from tests.data.ctc_corpus import SAMPLES, SHAPE, write_corpus, write_dictionary
from tests.encoder import checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two old recognisers, the Fisher information of the first, and a corpus."""
    folder = tmp_path_factory.mktemp("forgetting")
    manifest = write_corpus(folder)
    write_dictionary(folder)
    for name, seed in (("old", 0), ("older", 1)):
        checkpoints.save(checkpoints.fine_tuned("wav2vec2", SHAPE, seed=seed)[0], folder / f"{name}.pt")
        model = s3distill.load(folder / f"{name}.pt")
        fisher = estimate_fisher(model, find_utterances(manifest, model, model.symbols), model.symbols)
        write_fisher(folder / f"{name}.safetensors", fisher)
    checkpoints.save(checkpoints.pretrained("wav2vec2", SHAPE)[0], folder / "pretrained.pt")
    wide = {**SHAPE, "encoder_embed_dim": 48}
    checkpoints.save(checkpoints.fine_tuned("wav2vec2", wide)[0], folder / "wide.pt")
    return folder


def build(
    folder: Path,
    start: str = "old.pt",
    with_head: bool = True,
    normalize: bool = False,
    model_options: dict[str, Any] | None = None,
    **criterion: Any,
) -> tuple[Any, Any, Any]:
    """(criterion, model, task) as `fairseq-hydra-train` builds them; the student starts as the old recogniser."""
    for option, ending in (("ewc_paths", "safetensors"), ("old_model_paths", "pt")):
        if option in criterion:
            criterion[option] = [str(folder / f"{name}.{ending}") for name in criterion[option]]
    cfg = OmegaConf.structured(FairseqConfig())
    OmegaConf.set_struct(cfg, False)
    cfg.task = {"_name": "audio_ctc_distill", "data": str(folder), "labels": "ltr", "normalize": normalize}
    training = {"apply_mask": False, "feature_grad_mult": 1.0, "normalize": normalize}
    start_option = "student_path" if with_head else "w2v_path"
    cfg.model = {"_name": "wav2vec_ctc_student", start_option: str(folder / start), **training, **(model_options or {})}
    cfg.criterion = {"_name": "ctc_distill", "alpha": 1.0, "zero_infinity": True, **criterion}
    add_defaults(cfg)
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model)
    return task.build_criterion(cfg.criterion), model.eval(), task


def batch(task: Any, rows: list[int] | None = None) -> Any:
    if "train" not in task.datasets:
        task.load_dataset("train")
    dataset = task.datasets["train"]
    return dataset.collater([dataset[i] for i in (range(len(SAMPLES)) if rows is None else rows)])


@torch.no_grad()
def move(model: torch.nn.Module, amount: float = 0.05) -> None:
    """What learning does: every weight is somewhere else."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(amount * torch.randn(parameter.shape, generator=generator))


EWC = {"ewc_paths": ["old"], "ewc_lambda": 3.0}
TAC = {"old_model_paths": ["old"], "tac_gamma": 0.7}


@pytest.mark.parametrize("options", [EWC, TAC, {**EWC, **TAC}], ids=["ewc", "tac", "both"])
def test_nothing_is_forgotten_at_the_start(folder: Path, options: dict) -> None:
    criterion, model, task = build(folder, **options)
    plain, *_ = build(folder)
    loss, _, log = criterion(model, batch(task))
    expected, _, _ = plain(model, batch(task))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert all(abs(log[f"loss_{name}"]) < 1e-4 for name in ("ewc", "task_alignment") if f"loss_{name}" in log)
    assert plain.forgetting is None


def test_ewc_holds_weights_as_the_fisher_says(folder: Path) -> None:
    criterion, model, task = build(folder, ewc_paths=["old", "older"], ewc_lambda=3.0)
    plain, *_ = build(folder)
    move(model)
    sample = batch(task)
    loss, num_frames, log = criterion(model, sample)
    loss_gradient = torch.autograd.grad(loss, model.get_parameter("w2v_encoder.proj.weight"))[0]
    other, *_ = plain(model, sample)
    other_gradient = torch.autograd.grad(other, model.get_parameter("w2v_encoder.proj.weight"))[0]
    files = [read_fisher(folder / f"{name}.safetensors") for name in ("old", "older")]
    parameters = dict(model.named_parameters())
    penalty = sum(
        (value * (parameters[name].detach() - file.means[name]).square()).sum().item()
        for file in files
        for name, value in file.values.items()
    )
    assert penalty > 0.01 and log["loss_ewc"].item() == pytest.approx(penalty * num_frames, rel=1e-4)
    assert (loss - other).item() == pytest.approx(3 * penalty * num_frames, rel=1e-3)
    name = "w2v_encoder.proj.weight"
    pull = sum(2 * file.values[name] * (parameters[name].detach() - file.means[name]) for file in files)
    torch.testing.assert_close(loss_gradient - other_gradient, 3 * num_frames * pull, rtol=1e-3, atol=1e-3)


def test_normalised_by_the_mean_of_each_file(folder: Path) -> None:
    """Two files of very different size count alike, whichever scale they have."""
    criterion, model, task = build(folder, ewc_paths=["old", "older"], ewc_lambda=1.0, ewc_normalize=True)
    move(model)
    log = criterion(model, batch(task))[2]
    parameters, expected = dict(model.named_parameters()), 0.0
    for name in ("old", "older"):
        file = read_fisher(folder / f"{name}.safetensors")
        mean = torch.cat([value.flatten() for value in file.values.values()]).double().mean().item()
        assert file.mean() == pytest.approx(mean, rel=1e-9) and abs(mean - 1) > 0.1
        for key, value in file.values.items():
            expected += (value * (parameters[key].detach() - file.means[key]).square()).sum().item() / mean
    assert log["loss_ewc"].item() == pytest.approx(expected * log["sample_size"], rel=1e-4)


def test_a_free_head_is_not_held(folder: Path) -> None:
    criterion, model, task = build(folder, **EWC, ewc_head=False)
    with torch.no_grad():
        model.get_parameter("w2v_encoder.proj.weight").add_(1)
    assert criterion(model, batch(task))[2]["loss_ewc"] == 0
    held, *_ = build(folder, **EWC)
    assert held(model, batch(task))[2]["loss_ewc"] > 0


def test_a_frozen_encoder_is_not_pulled_either(folder: Path) -> None:
    """Two old tasks want two things of the weights; before the encoder thaws, the head alone may follow."""
    options = {"ewc_paths": ["old", "older"], "ewc_lambda": 3.0, "model_options": {"freeze_finetune_updates": 4}}
    criterion, model, task = build(folder, **options)
    sample = batch(task)
    for update, learns in ((0, False), (4, True)):
        model.train().set_num_updates(update)
        model.zero_grad(set_to_none=True)
        loss, _, log = criterion(model, sample)
        loss.backward()
        gradients = {name for name, p in model.named_parameters() if p.grad is not None}
        assert ("w2v_encoder.w2v_model.encoder.layers.0.fc1.weight" in gradients) == learns
        assert "w2v_encoder.proj.weight" in gradients and log["loss_ewc"] > 0


def test_weights_that_do_not_learn_need_not_be_held(folder: Path) -> None:
    masks = {"masks": True, "fix_attn": False, "fix_fc": False}
    with pytest.raises(ValueError, match=r"none of those in .*old\.safetensors learns .* model\.co_train=true"):
        build(folder, **EWC, model_options=masks)
    build(folder, **EWC, model_options={**masks, "trainable_proj": True})


@pytest.mark.parametrize("old_heads", ["learn", "frozen"])
def test_task_alignment(folder: Path, old_heads: str) -> None:
    criterion, model, task = build(folder, old_model_paths=["old", "older"], tac_gamma=0.7, old_heads=old_heads)
    move(model)
    sample = batch(task)
    loss, _, log = criterion(model, sample)
    inputs = sample["net_input"]
    out = model(**inputs, predict=True)
    valid = ~out["padding_mask"]
    expected = 0.0
    for name in ("old", "older"):
        old = s3distill.load(folder / f"{name}.pt")
        q = old(inputs["source"], (~inputs["padding_mask"]).sum(-1)).logits.log_softmax(-1)[valid]
        p = (out["x"] @ old.head.weight.T + old.head.bias).log_softmax(-1)[valid]
        expected += (p.exp() * (p - q)).sum().item() / 2
    assert expected > 0.1 and log["loss_task_alignment"].item() == pytest.approx(expected, rel=1e-4)
    plain, *_ = build(folder)
    assert (loss - plain(model, sample)[0]).item() == pytest.approx(0.7 * expected, rel=1e-3)
    loss.backward()
    learned = dict(criterion.named_parameters())
    assert set(criterion.state_dict()) == set(learned)
    names = {f"forgetting.old_heads.{k}.{part}" for k in (0, 1) for part in ("weight", "bias")}
    assert set(learned) == (names if old_heads == "learn" else set())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learned.values())


@pytest.mark.parametrize("options", [TAC, EWC], ids=["tac", "ewc"])
def test_padding_changes_nothing(folder: Path, options: dict) -> None:
    criterion, model, task = build(folder, **options)
    move(model)
    name = "task_alignment" if "tac_gamma" in options else "ewc"
    _, num_frames, log = criterion(model, batch(task))
    single = [criterion(model, batch(task, [i])) for i in range(len(SAMPLES))]
    assert num_frames == sum(frames for _, frames, _ in single)
    together = sum(log[f"loss_{name}"].item() for *_, log in single)
    assert log[f"loss_{name}"].item() == pytest.approx(together, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (
            {"ewc_lambda": 1.0},
            r"`criterion.ewc_paths` and `criterion.ewc_lambda` belong together, but are \[\] and 1.0",
        ),
        ({"ewc_paths": ["old"]}, r"belong together, but are .* and 0.0; pass both, or neither"),
        ({**EWC, "ewc_lambda": -1.0}, r"`criterion.ewc_lambda` must be at least 0 and finite, but is -1.0"),
        ({"old_model_paths": ["old"]}, r"`criterion.old_model_paths` and `criterion.tac_gamma` belong together"),
        ({"ewc_head": False}, r"`criterion.ewc_head` is about `criterion.ewc_paths`, which is empty"),
        ({"ewc_normalize": True}, r"`criterion.ewc_normalize` is about `criterion.ewc_paths`, which is empty"),
        ({"old_heads": "frozen"}, r"`criterion.old_heads` is about `criterion.old_model_paths`, which is empty"),
        (
            {**EWC, "start": "wide.pt"},
            r"old.safetensors must be .* but w2v_encoder.* is \[.*\] there and \[.*\] in the",
        ),
        ({**TAC, "start": "wide.pt"}, r"old model .*old.pt must fit the student, but is for width 32 .* has width 48"),
        (
            {**TAC, "old_model_paths": ["pretrained"]},
            r"must be recognisers with a CTC head, but .*pretrained.pt has none",
        ),
        ({**EWC, "ewc_paths": ["gone"]}, r"there is no Fisher file .*gone.safetensors; write it with s3distill fisher"),
    ],
)
def test_faults(folder: Path, options: dict, fault: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=fault):
        build(folder, **options)


def test_a_head_over_other_symbols_cannot_be_held(folder: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / "dict.ltr.txt").write_text("| 1\nE 1\nT 1\nO 1\nA 1\n")  # two letters have changed places
    for name in ("old.pt", "old.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(
        ValueError, match=r"over its own symbols, but the task's dictionary differs in their order; .*ewc_head"
    ):
        build(tmp_path, **EWC)
    build(tmp_path, **EWC, ewc_head=False)


def test_a_task_with_letters_of_its_own(folder: Path, tmp_path: Path) -> None:
    """The encoder of the old recogniser with a new head: the old encoder is held, and the old head goes along."""
    write_corpus(tmp_path)
    (tmp_path / "dict.ltr.txt").write_text("| 1\nE 1\nT 1\nA 1\nO 1\nÄ 1\n")
    for name in ("old.pt", "old.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    criterion, model, task = build(tmp_path, with_head=False, **EWC, **TAC, ewc_head=False)
    log = criterion(model, batch(task))[2]
    assert log["loss_ewc"] == 0 and abs(log["loss_task_alignment"]) < 1e-4
    assert len(model.w2v_encoder.proj.weight) == 10 and len(criterion.forgetting.old_heads[0].weight) == 9


def write_run(path: Path, criterion: Any, model: Any, old: Path | None) -> Path:
    """What the trainer saves of a run, as far as `old-head` reads it."""
    state, _ = checkpoints.fine_tuned("wav2vec2", SHAPE)
    state["model"] = model.state_dict()
    state["criterion"] = criterion.state_dict() or None
    state["cfg"]["criterion"] = {"_name": "ctc_distill", "old_model_paths": [str(old)] if old else []}
    return checkpoints.save(state, path)


def test_old_head(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The later encoder with the head that learned along, or with the old one where none did."""
    criterion, model, _ = build(folder, old_model_paths=["older"], tac_gamma=1.0)
    move(model)
    move(criterion)
    x = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    features = model(x, predict=True)["x"]
    learned, old = criterion.forgetting.old_heads[0], s3distill.load(folder / "older.pt")
    for head, trained, said in (
        (learned, folder / "older.pt", "the run learned it"),
        (old.head, None, "of other paths: pass OLD as"),
    ):
        run = write_run(tmp_path / "run.pt", criterion, model, trained)
        assert main(["old-head", str(run), str(folder / "older.pt"), str(tmp_path / "out.pt")]) == 0
        assert said in capsys.readouterr().out
        made = s3distill.load(tmp_path / "out.pt")
        torch.testing.assert_close(made(x).logits, features @ head.weight.T + head.bias, rtol=1e-4, atol=1e-5)
        assert made.symbols == old.symbols
    assert (learned.weight - old.head.weight).abs().max() > 0.01


def test_what_old_head_refuses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, fault in [
        (["old.pt", "pretrained.pt", "out.pt"], "OLD must be a recogniser with a CTC head and its dictionary"),
        (["wide.pt", "old.pt", "out.pt"], "is for width 32, and the encoder has 48; was RUN started from OLD?"),
        (["old.pt", "older.pt", "older.pt"], "OUT must be another file than what is read"),
    ]:
        paths = [str(tmp_path / a if a == "out.pt" else folder / a) for a in arguments]
        assert main(["old-head", *paths]) == 2
        assert fault in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()


def test_a_start_without_old_heads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fairseq hands over what a checkpoint has of the criterion: None, where it was trained without."""
    criterion, *_ = build(folder, **TAC)
    with pytest.raises(ValueError, match=r"the checkpoint must have the old heads of criterion.old_model_paths"):
        criterion.load_state_dict(None, strict=True)
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    monkeypatch.setattr(compat, "starts_from_another_run", lambda: True)
    criterion.load_state_dict(None, strict=True)
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())


def test_a_fisher_file_of_another_model_of_the_same_shape_is_refused(folder: Path) -> None:
    for files in (["older"], ["older", "old"]):
        criterion, model, task = build(folder, ewc_paths=files, ewc_lambda=1.0)
        model.train()
        if "old" in files:  # the last task's; the other one is of a task before it
            criterion(model, batch(task))
            continue
        with pytest.raises(
            ValueError, match=r"older\.safetensors must be the Fisher .* another model of the same shape"
        ):
            criterion(model, batch(task))
    move(model)
    criterion(model, batch(task))  # only the start is looked at
    resumed, model, task = build(folder, ewc_paths=["old"], ewc_lambda=1.0)
    move(model)
    model.train().set_num_updates(2)
    resumed(model, batch(task))


def test_old_heads_of_another_run_are_not_taken_for_those_of_this_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain of tasks: the run that ``finetune_from_model`` names kept the head of a task before."""
    first, *_ = build(folder, **TAC)
    move(first)
    then, *_ = build(folder, old_model_paths=["older"], tac_gamma=0.7)
    before = {name: value.clone() for name, value in then.state_dict().items()}
    monkeypatch.setattr(compat, "starts_from_another_run", lambda: True)
    then.load_state_dict(first.state_dict(), strict=True)
    assert all(torch.equal(value, before[name]) for name, value in then.state_dict().items())
    monkeypatch.undo()
    then.load_state_dict(first.state_dict(), strict=True)  # a run that goes on
    assert not any(torch.equal(value, before[name]) for name, value in then.state_dict().items())


def test_a_threshold_that_is_new_beside_ewc(folder: Path) -> None:
    """No old heads, so nothing that the checkpoint must have: the run goes on, and holds the weights as before."""
    criterion, model, task = build(folder, **EWC)
    move(model)
    before = criterion(model, batch(task))[0]
    criterion.load_state_dict(None, strict=True)
    assert torch.equal(criterion(model, batch(task))[0], before)
