"""What happens before fairseq starts: devices that are not there, options of another model, jobs of a sweep."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

pytest.importorskip("fairseq")

from fairseq import checkpoint_utils
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq_cli import hydra_train
from fairseq_cli import train as training
from hydra.core.hydra_config import HydraConfig

import s3distill  # noqa: F401  registers the models
from s3distill.cli.train import check_files, check_option_names
from s3distill.compat import launch
from s3distill.compat.starts import forget_last_run, require_own_folder

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "config" / "s3_router" / "base_1h.yaml"
LOCAL = "tcp://localhost:29500"


@pytest.fixture(autouse=True)
def not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever started the tests."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def with_gpus(number: int) -> Any:
    return mock.patch.object(torch.cuda, "device_count", lambda: number)


def devices(world_size: int | None = 1, method: str | None = None, fp16: bool = False, **options: Any) -> DictConfig:
    common = {"fp16": fp16} | {k: options.pop(k) for k in list(options) if not k.startswith("distributed")}
    distributed = {"distributed_world_size": world_size, "distributed_init_method": method, **options}
    return OmegaConf.create({"common": common, "distributed_training": distributed})


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("num_gpus", "cfg"),
    [
        (0, devices(1)),
        (0, devices(None)),
        (1, devices(1, fp16=True)),
        (1, devices(1, LOCAL)),
        (2, devices(2, LOCAL, fp16=True)),
        (8, devices(2, LOCAL)),
        # without an address fairseq sees for itself that there are too few
        (1, devices(2)),
        # ranks that are started one by one, and several machines
        (0, devices(2, LOCAL, distributed_no_spawn=True)),
        (8, devices(16, "tcp://node0:29500")),
        (8, devices(16, "tcp://10.0.0.1:29500", distributed_rank=8)),
        (8, devices(16, "file:///shared/rendezvous")),
        # fairseq can do these on a CPU
        (0, devices(1, fp16=True, fp16_no_flatten_grads=True)),
        (0, devices(1, fp16=True, memory_efficient_fp16=True)),
        (0, devices(1, bf16=True)),
        (0, devices(1, fp16=True, tpu=True)),
    ],
)
def test_starts_that_are_fine(num_gpus: int, cfg: DictConfig) -> None:
    before = OmegaConf.to_container(cfg)
    with with_gpus(num_gpus):
        launch.check_devices(cfg)
    assert OmegaConf.to_container(cfg) == before


@pytest.mark.parametrize(
    ("num_gpus", "cfg", "parts"),
    [
        (0, devices(1, LOCAL), [f"distributed_init_method={LOCAL}", "no GPU here", "nothing would be trained"]),
        (0, devices(2, LOCAL), ["distributed_init_method", "distributed_world_size=1 common.fp16=false"]),
        (0, devices(2), ["distributed_world_size=2 starts one process per GPU", "common.fp16=false"]),
        (0, devices(16, "tcp://node0:29500"), ["no GPU here"]),
        (1, devices(2, LOCAL), ["distributed_world_size is 2, but 1 GPU is visible", "distributed_world_size=1"]),
        (2, devices(4, "tcp://127.0.0.1:29500"), ["is 4, but 2 GPUs are visible", "distributed_world_size=2"]),
        (0, devices(1, fp16=True), ["common.fp16 gathers its gradients on a GPU", "pass common.fp16=false"]),
    ],
)
def test_starts_that_would_train_nothing_or_wait_for_ever(num_gpus: int, cfg: DictConfig, parts: list[str]) -> None:
    with with_gpus(num_gpus), pytest.raises(RuntimeError) as caught:
        launch.check_devices(cfg)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_ranks_of_torchrun_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with with_gpus(0):
        with pytest.raises(RuntimeError):
            launch.check_devices(devices(2))
        monkeypatch.setenv("RANK", "0")
        launch.check_devices(devices(2))


def test_half_precision_on_a_cpu_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with with_gpus(0), caplog.at_level(logging.WARNING):
        launch.check_devices(devices(1, fp16=True, fp16_no_flatten_grads=True))
    assert "common.fp16 on a CPU is slow and stops at the first overflow; pass common.fp16=false" in caplog.text


def test_a_configuration_without_these_sections_passes() -> None:
    with with_gpus(0):
        launch.check_devices(OmegaConf.create({}))


# ---------------------------------------------------------------- one recipe for two models


def recipe(name: str, **options: Any) -> DictConfig:
    """The recipe with another model; struct, as hydra hands it over."""
    cfg = OmegaConf.load(RECIPE)
    cfg.model._name = name
    for key, value in options.items():
        cfg.model[key] = value
    OmegaConf.set_struct(cfg, True)
    return cfg


@pytest.fixture
def typed() -> Iterator[Callable[..., Any]]:
    """Lets hydra say what stood on the command line."""
    with mock.patch.object(HydraConfig, "initialized", lambda: True):
        yield lambda *words: mock.patch.object(
            HydraConfig, "get", lambda: OmegaConf.create({"overrides": {"task": list(words)}})
        )


@pytest.mark.parametrize("name", ["wav2vec_ctc", "wav2vec_seq2seq", "hubert_ctc"])
def test_options_of_masks_are_left_out_for_another_model(name: str, caplog: pytest.LogCaptureFixture) -> None:
    cfg = recipe(name)
    before = set(cfg.model)
    with caplog.at_level(logging.INFO):
        launch.leave_out_foreign_options(cfg)
    known = {f.name for f in fields(MODEL_DATACLASS_REGISTRY[name])}
    masks = {f.name for f in fields(MODEL_DATACLASS_REGISTRY["wav2vec_ctc_st"])} - known
    assert set(cfg.model) == before - masks and before & masks
    assert {"prune_rate", "init_score", "fix_attn", "eval_only"} <= before & masks
    assert (
        f"model._name={name}: the recipe's {len(before & masks)} options of wav2vec_ctc_st are left out" in caplog.text
    )
    assert OmegaConf.is_struct(cfg), "it stays closed"


def test_values_that_both_models_know_stay() -> None:
    cfg = recipe("wav2vec_ctc", dropout=0.37)
    launch.leave_out_foreign_options(cfg)
    assert (cfg.model.dropout, cfg.model.mask_prob, cfg.model._name) == (0.37, 0.65, "wav2vec_ctc")


@pytest.mark.parametrize("name", ["wav2vec_ctc_st", "no_such_model", None])
def test_other_configurations_are_left_alone(name: str | None) -> None:
    cfg = recipe("wav2vec_ctc_st")
    cfg.model._name = name
    before = OmegaConf.to_container(cfg)
    launch.leave_out_foreign_options(cfg)
    assert OmegaConf.to_container(cfg) == before


def test_a_configuration_without_a_model_is_left_alone() -> None:
    for values in ({"model": None}, {}):
        cfg = OmegaConf.create(values)
        launch.leave_out_foreign_options(cfg)
        assert cfg == values


@pytest.mark.parametrize("word", ["model.prune_rate=0.3", "+model.prune_rate=0.3", "++model.prune_rate=0.3"])
def test_an_option_that_was_typed_is_refused(typed: Callable[..., Any], word: str) -> None:
    with typed("model._name=wav2vec_ctc", "model.dropout=0.2", word), pytest.raises(ValueError) as caught:
        launch.leave_out_foreign_options(recipe("wav2vec_ctc"))
    assert str(caught.value) == (
        "model.prune_rate: belongs to the model wav2vec_ctc_st, but model._name is wav2vec_ctc, which would ignore it; leave it out or "
        "pass model._name=wav2vec_ctc_st"
    )


def test_typed_options_of_both_models_are_fine(typed: Callable[..., Any]) -> None:
    cfg = recipe("wav2vec_ctc")
    with typed("model._name=wav2vec_ctc", "model.dropout=0.2", "optimization.max_update=3"):
        launch.leave_out_foreign_options(cfg)
    assert "dropout" in cfg.model and "prune_rate" not in cfg.model


# ---------------------------------------------------------------- jobs of a sweep


def test_a_job_inherits_no_best_score() -> None:
    checkpoint_utils.save_checkpoint.best = 3.0
    training.should_stop_early.best, training.should_stop_early.num_runs = 3.0, 7
    forget_last_run()
    assert not hasattr(checkpoint_utils.save_checkpoint, "best")
    assert not hasattr(training.should_stop_early, "best") and not hasattr(training.should_stop_early, "num_runs")
    forget_last_run()  # a first job has nothing to forget


def test_two_jobs_of_a_sweep_in_one_folder_are_refused() -> None:
    folders: set[str] = set()
    for folder in ("sweep/0.5", "sweep/0.75"):
        require_own_folder(folder, folders)
    with pytest.raises(
        ValueError, match=r"two jobs of this sweep write to sweep/0.5: hydra.sweep.subdir does not name"
    ):
        require_own_folder("sweep/0.5", folders)


# ---------------------------------------------------------------- the way in


@pytest.fixture
def stock() -> Iterator[list[str]]:
    """`fairseq_cli.hydra_train` without checks; the calls of its `add_defaults`."""
    called: list[str] = []
    with mock.patch.object(hydra_train, "add_defaults", lambda cfg: called.append("add_defaults")):
        yield called


def test_checks_come_before_fairseqs_own_start_and_once(stock: list[str]) -> None:
    callback = launch.LaunchCallback()
    for _ in range(3):  # jobs of a sweep
        callback.on_job_start(OmegaConf.create({}), config_name="base_1h")
    launch.prepare(lambda cfg: stock.append("ours"))
    seen = mock.Mock()
    with mock.patch.object(launch, "check_devices", seen):
        hydra_train.add_defaults(OmegaConf.create({"model": None}))
    assert stock == ["ours", "add_defaults"] and seen.call_count == 1


def test_a_check_that_raises_stops_the_start(stock: list[str]) -> None:
    def refuse(cfg: DictConfig) -> None:
        raise ValueError("no")

    launch.prepare(refuse)
    with with_gpus(1), pytest.raises(ValueError, match="no"):
        hydra_train.add_defaults(OmegaConf.create({"model": None}))
    assert stock == []


def test_every_recipe_of_s3_router_checks_its_start() -> None:
    for path in sorted((ROOT / "config" / "s3_router").glob("*.yaml")):
        callback = OmegaConf.select(OmegaConf.load(path), "hydra.callbacks.s3distill._target_")
        assert callback == "s3distill.compat.launch.LaunchCallback", path.name


# ---------------------------------------------------------------- what `s3distill train` checks


NAMED = ["--config-dir", str(RECIPE.parent), "--config-name", RECIPE.stem]


@pytest.mark.parametrize(
    "word",
    [
        *("model.prune_rate=0.9", "optimization.lr=[0.1]", "checkpoint.patience=3", "common.user_dir=s3distill"),
        *("++model.new=1", "+model.new=1", "~model.prune_rate", "hydra.run.dir=out", "hydra/launcher=submitit_slurm"),
        *("task._name=audio_ctc", "distributed_training.distributed_port=1", "--multirun", "-m"),
    ],
)
def test_names_that_are_known(word: str) -> None:
    check_option_names([*NAMED, word])
    check_option_names([word, *NAMED])


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("model.prune_rat=0.9", "model.prune_rate"),
        ("model.trainable_projection=true", "model.trainable_proj"),
        ("chekpoint.finetune_from_model=a.pt", "checkpoint.finetune_from_model"),
        ("dataset.max_token=1", "dataset.max_tokens"),
        ("prune_rate=0.9", "model.prune_rate"),
    ],
)
def test_names_that_are_misspelt(word: str, near: str) -> None:
    with pytest.raises(
        ValueError, match=rf"has no option `{re.escape(word.split('=')[0])}`; did you mean .*{re.escape(near)}"
    ):
        check_option_names([*NAMED, word])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config-dir={}", "--config-name={}"],
        ["-cd", "{}", "-cn", "{}"],
        ["--config-dir", "{}", "--config-name", "{}.yaml"],
    ],
)
def test_the_recipe_is_found_however_it_is_named(arguments: list[str]) -> None:
    values = iter((str(RECIPE.parent), RECIPE.stem))
    filled = [a.format(next(values)) if "{}" in a else a for a in arguments]
    with pytest.raises(ValueError, match=r"has no option `model\.x`"):
        check_option_names([*filled, "model.x=1"])


def test_without_a_recipe_the_names_are_fairseqs_affair() -> None:
    check_option_names(["model.whatever=1"])
    check_option_names(["--config-dir", "nowhere", "model.whatever=1"])


def test_a_recipe_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there are base_1h, demo, .*xlsr"):
        check_option_names(["--config-dir", str(RECIPE.parent), "--config-name", "base_10h"])
    with pytest.raises(FileNotFoundError, match="there is no recipe in that folder"):
        check_option_names(["--config-dir", str(tmp_path), "--config-name", "base_10h"])


def complete(tmp_path: Path, **changes: Any) -> DictConfig:
    """A configuration whose files are there but for the manifests."""
    (tmp_path / "base.pt").touch()
    cfg = OmegaConf.load(RECIPE)
    cfg.model.w2v_path, cfg.task.data = str(tmp_path / "base.pt"), str(tmp_path)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    del cfg.hydra
    return cfg


@pytest.mark.parametrize("key", ["model.w2v_path", "task.data"])
def test_what_must_be_given(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=rf"`{re.escape(key)}` must be given, .* pass {re.escape(key)}=PATH"):
        check_files(complete(tmp_path, **{key.replace(".", "__"): "???"}))


@pytest.mark.parametrize(
    "key", ["model.w2v_path", "task.data", "checkpoint.finetune_from_model", "checkpoint.restore_file"]
)
def test_what_must_exist(tmp_path: Path, key: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"`{re.escape(key)}` must name what exists, but there is no nowhere"):
        check_files(complete(tmp_path, **{key.replace(".", "__"): "nowhere"}))


def test_manifests_of_all_subsets_are_read(tmp_path: Path) -> None:
    seen: list[tuple[str, str, str]] = []

    def validate(*paths: Path) -> None:
        seen.append(tuple(path.name for path in paths))  # type: ignore[arg-type]

    with mock.patch("s3distill.cli.train.validate_for_training", validate):
        check_files(complete(tmp_path, dataset__valid_subset="dev, test"))
        names = [f"{split}.tsv" for split in ("train", "dev", "test")]
        assert seen == [(name, name.replace("tsv", "ltr"), "dict.ltr.txt") for name in names]
        seen.clear()
        check_files(complete(tmp_path, dataset__disable_validation=True))
        assert [paths[0] for paths in seen] == ["train.tsv"]


def test_fairseqs_default_configuration_is_not_in_the_way() -> None:
    from fairseq.dataclass.configs import FairseqConfig

    check_files(OmegaConf.structured(FairseqConfig))
