"""Every recipe under config/: it composes as on the command line, has the published values, and trains."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import soundfile
import torch
from omegaconf import DictConfig, OmegaConf

pytest.importorskip("fairseq")

import fairseq
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from fairseq_cli import hydra_train

import s3distill
from s3distill import compat
from s3distill.data.manifest import write_manifest
from s3distill.encoder.config import SAMPLE_RATE, EncoderConfig
from s3distill.gates import GateCounts, count_parameters
from tests.encoder import checkpoints, folders

ROOT = Path(__file__).parents[2]
# folders whose files stand on a recipe: student=NAME, +ablation=NAME; see test_students.py
PARTS = ("student", "ablation")
RECIPES = sorted(recipe for recipe in (ROOT / "config").rglob("*.yaml") if recipe.parent.name not in PARTS)
FOR_REAL_DATA = [recipe for recipe in RECIPES if recipe.parent.name in ("distill", "finetuning", "s3_router")]
FAMILIES = ("hubert_base", "hubert_large", "wav2vec2_base", "wav2vec2_large", "data2vec_base", "wavlm_base_plus")
HOURS = ("100h", "10h", "1h")
REGISTERED = ("task", "model", "criterion", "optimizer", "lr_scheduler")  # sections whose options their `_name` decides


def name_of(recipe: Path) -> str:
    return recipe.relative_to(ROOT / "config").with_suffix("").as_posix()


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # hydra's, about fairseq's use of it
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=name_of)


def dataclass_of(section: str, name: str) -> Any:
    """The config dataclass that is registered under a name."""
    if section == "task":
        return TASK_DATACLASS_REGISTRY[name]
    if section == "model":
        return MODEL_DATACLASS_REGISTRY[name]
    return REGISTRIES[section]["dataclass_registry"][name]


def distill_recipe(family: str, stage: int) -> Path:
    return ROOT / "config" / "distill" / f"dphubert_{family}_stage{stage}.yaml"


def flat(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {dotted key: value}; interpolations stay as they are written."""
    values = OmegaConf.to_container(cfg) if OmegaConf.is_config(cfg) else cfg
    if not isinstance(values, Mapping):
        return {prefix: values}
    return {k: v for key, value in values.items() for k, v in flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def missing_keys(recipe: Path) -> list[str]:
    return [key for key, value in flat(OmegaConf.load(recipe)).items() if value == "???"]


@functools.cache
def compose(recipe: Path, *overrides: str) -> DictConfig:
    """What `fairseq-hydra-train` would train with: its own entry point up to where training starts. Read only.

    Paths that must be given are given as their own key: ``task.data=given/task.data``.
    """
    seen: list[DictConfig] = []

    def stop_here(cfg: DictConfig) -> None:  # `_hydra_main` of fairseq does these two things, then trains
        add_defaults(cfg)
        seen.append(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)))

    given = [f"{key}=given/{key}" for key in missing_keys(recipe)]
    quiet = ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.run.dir=run_dir"]
    options = ["--config-dir", str(recipe.parent), "--config-name", recipe.stem]
    with (
        mock.patch.object(hydra_train, "_hydra_main", stop_here),
        mock.patch.object(sys, "argv", ["fairseq-hydra-train", *options, *quiet, *given, *overrides]),
    ):
        hydra_train.cli_main()
    (cfg,) = seen
    return cfg


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_there_are_recipes_for_every_family() -> None:
    names = {name_of(recipe) for recipe in RECIPES}
    wanted = {f"distill/dphubert_{family}_stage{stage}" for family in FAMILIES for stage in (1, 2)}
    wanted |= {f"finetuning/librispeech_{hours}" for hours in HOURS}
    wanted |= {f"quickstart/{name}" for name in ("teacher", "stage1", "stage2", "finetune")}
    assert wanted <= names


# --- composing


@each_recipe
def test_composes_and_every_key_is_an_option(recipe: Path) -> None:
    cfg = compose(recipe)  # merges the registered dataclasses: an unknown key or a wrong type raises
    raw = OmegaConf.load(recipe)
    assert set(raw) <= {"defaults", "hydra", *FairseqConfig.__dataclass_fields__}
    for section in REGISTERED:
        known = {f.name for f in fields(dataclass_of(section, raw[section]._name))} | {"_name"}
        assert set(raw[section]) <= known == set(cfg[section]), f"`{section}` of {name_of(recipe)}"
    nested = OmegaConf.select(raw, "model.w2v_args")
    if nested is not None:
        assert set(nested.model) <= {"_name", *(f.name for f in fields(Wav2Vec2Config))}
        assert set(nested.task) <= {"_name", *(f.name for f in fields(TASK_DATACLASS_REGISTRY[nested.task._name]))}


@each_recipe
def test_paths_mean_what_was_typed_and_outputs_stay_together(recipe: Path) -> None:
    raw, cfg = OmegaConf.load(recipe), compose(recipe)
    assert raw.hydra.job.chdir is False
    assert cfg.common.user_dir == "s3distill"
    assert Path(cfg.checkpoint.save_dir).is_absolute() and cfg.checkpoint.save_dir.endswith("/run_dir/checkpoints")
    assert cfg.task.data == "given/task.data"
    folders = {other: flat(OmegaConf.load(other))["hydra.run.dir"] for other in RECIPES}
    same_folder = [name_of(other) for other in RECIPES if folders[other] == folders[recipe]]
    assert same_folder == [name_of(recipe)]


# S3-Router's own recipes say 2, which its published commands override; the small ones train on one device
_WORLD_SIZES = {"base_1h": 2, "xlsr": 2, "demo": 1, "pruning_demo": 1, "labels": 1}


@pytest.mark.parametrize("recipe", FOR_REAL_DATA, ids=name_of)
def test_runs_on_all_visible_gpus_and_without_one(recipe: Path) -> None:
    """fairseq's own default, which a number in the recipe would replace: it stops where there are fewer GPUs."""
    number = _WORLD_SIZES[recipe.stem] if recipe.parent.name == "s3_router" else None
    assert OmegaConf.load(recipe).distributed_training.get("distributed_world_size") == number
    found = compose(recipe).distributed_training.distributed_world_size
    assert found == (number or max(1, torch.cuda.device_count()))


def test_options_of_fairseqs_own_sections_can_be_overridden_though_not_listed() -> None:
    cfg = compose(FOR_REAL_DATA[0], "distributed_training.distributed_world_size=4", "checkpoint.patience=3")
    assert (cfg.distributed_training.distributed_world_size, cfg.checkpoint.patience) == (4, 3)


# Options that the recipes leave out; all others are listed, since hydra refuses to override what is not.
_CORPORA = "multi_corpus_keys multi_corpus_sampling_weights binarized_dataset text_compression_level subsample"
_OTHER_TASKS = "rebuild_batches precompute_mask_config post_save_script"  # of data2vec 2.0 and of TPUs
_CHANNEL_MASKS = (
    "mask_channel_prob mask_channel_length mask_channel_selection mask_channel_other no_mask_channel_overlap "
    "mask_channel_min_space mask_channel_before"
)
_SHAPE = (
    "encoder extractor_mode conv_feature_layers conv_bias encoder_layers encoder_embed_dim encoder_ffn_embed_dim "
    "encoder_attention_heads activation_fn layer_norm_first conv_pos conv_pos_groups pos_conv_depth "
    "relative_position_embedding num_buckets max_distance "
    "separable_conv_layers time_reduction shared shared_group attention attention_window attention_global "
    "linformer_dim linformer_max_frames reuse_attention_layers"
)
_SEQ2SEQ = (
    "autoregressive eval_wer eval_wer_config eval_wer_tokenizer eval_wer_post_process eval_bleu eval_bleu_detok "
    "eval_bleu_detok_args eval_tokenized_bleu eval_bleu_remove_bpe eval_bleu_args eval_bleu_print_samples"
)
_DECODING = "decoder lexicon ngram_lm word_score beam_threshold symbol_threshold"  # of fairseq-generate
_FINE_TUNING = (
    "w2v_args offload_activations min_params_to_wrap layer_type adp_num adp_dim adp_act_fn adp_trf_idx "  # adapters
    "drop_path update_alibi zero_mask load_ema layer_decay"  # of data2vec 2.0
)
_NOT_LISTED = {
    "audio_distill": f"labels {_CORPORA} {_OTHER_TASKS}",
    "audio_ctc": (
        f"enable_padding num_batch_buckets target_dictionary mask_bank mask_name {_DECODING} {_CORPORA} "
        f"{_OTHER_TASKS} {_SEQ2SEQ}"
    ),
    # the shape is that of `student_path`, the widths are the teachers'; distillation masks no channels, and fine-tuning has its own masks
    # what is read of a latency table, and the heads' width of a student that was cut, are filled in
    "ssl_student": f"group_norm_over_padding extra_teacher_dims latency head_hidden_dim {_SHAPE} {_CHANNEL_MASKS}",
    "audio_labels": f"enable_padding num_batch_buckets {_CORPORA} {_OTHER_TASKS}",
    "wav2vec_ctc": _FINE_TUNING,
    "wav2vec_ctc_st": _FINE_TUNING,
    "wav2vec_label_st": f"blank_weight blank_mode {_FINE_TUNING}",
    "ctc": "wer_sil_weight wer_args",
    "adam": "use_old_adam fp16_adam_stats",
    "polynomial_decay": "force_anneal",
}
_NOT_LISTED |= {
    "audio_ctc_distill": _NOT_LISTED["audio_ctc"],
    "wav2vec_ctc_student": f"extra_teacher_dims latency head_hidden_dim {_FINE_TUNING}",
    "ctc_distill": _NOT_LISTED["ctc"],
}


@pytest.mark.parametrize("recipe", FOR_REAL_DATA, ids=name_of)
@pytest.mark.parametrize("section", REGISTERED)
def test_what_a_user_would_override_is_listed(recipe: Path, section: str) -> None:
    listed = set(OmegaConf.load(recipe)[section]) - {"_name"}
    name = OmegaConf.load(recipe)[section]._name
    # what follows another option (`${...}`) need not be listed
    own = {f.name for f in fields(dataclass_of(section, name)) if not str(f.default).startswith("${")} - {"_name"}
    assert own - listed == set(_NOT_LISTED.get(name, "").split()) - listed


def test_an_override_of_an_unknown_option_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compose(distill_recipe("hubert_base", 1), "model.dropuot=0.2")
    assert "dropuot" in capfd.readouterr().err


# --- values

PUBLISHED = {  # stage 1, stage 2  (Peng et al., 2023, and its recipe)
    "optimization.max_update": (50_000, 25_000),
    "optimization.lr": ([2e-4], [1e-4]),
    "lr_scheduler._name": ("polynomial_decay", "polynomial_decay"),  # linear, with power 1 and end 0
    "lr_scheduler.warmup_updates": (15_000, 5_000),
    "lr_scheduler.total_num_update": (50_000, 25_000),
    "lr_scheduler.power": (1.0, 1.0),
    "lr_scheduler.end_learning_rate": (0.0, 0.0),
    "criterion.target_sparsity": (0.75, 0.0),
    "criterion.sparsity_warmup": (5_000, 0),
    "criterion.l1_weight": (1.0, 1.0),
    "criterion.l2_weight": (0.0, 0.0),
    "criterion.cosine_weight": (1.0, 1.0),
    "criterion.cosine_type": ("raw", "raw"),
    "optimizer.gate_lr": (0.02, 0.02),
    "optimizer.multiplier_lr": (0.02, 0.02),
    "optimizer.adam_betas": ([0.9, 0.999], [0.9, 0.999]),  # AdamW's own
    "optimizer.weight_decay": (0.0, 0.0),
    "optimization.clip_norm": (10.0, 10.0),
    "optimization.update_freq": ([1], [1]),
    "common.fp16": (True, True),
    "dataset.max_tokens": (160 * SAMPLE_RATE, 160 * SAMPLE_RATE),
    "task.enable_padding": (False, False),
    "task.min_sample_size": (2 * SAMPLE_RATE, 2 * SAMPLE_RATE),
    "task.max_sample_size": (round(15.6 * SAMPLE_RATE), round(15.6 * SAMPLE_RATE)),
    "model.prune_units": (["conv", "head", "ffn"], []),
    "model.prune_measure": ("params", "params"),
    "model.head_mode": ("layer2layer", "layer2layer"),
    "model.head_sharing": ("shared", "shared"),
    "model.head_init": ("identity", "identity"),
    "model.dropout": (0.1, 0.1),
    "model.attention_dropout": (0.1, 0.1),
    "model.encoder_layerdrop": (0.0, 0.0),
    "model.feature_grad_mult": (1.0, 1.0),
}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_distillation_has_the_published_values(family: str, stage: int) -> None:
    cfg = compose(distill_recipe(family, stage))
    found = {key: OmegaConf.select(cfg, key) for key in PUBLISHED}
    assert found == {key: values[stage - 1] for key, values in PUBLISHED.items()}
    large = family.endswith("large")
    assert cfg.model.distill_layers == ("0,8,16,24" if large else "0,4,8,12")
    assert cfg.task.normalize is (large or family == "data2vec_base")  # as fairseq trained the released models
    assert cfg.model.student_path == "given/" + ("task.teacher_path" if stage == 1 else "model.student_path")
    assert cfg.common.fp16_no_flatten_grads, "the gates' learning rate would be lost"


def test_the_files_of_all_families_differ_in_the_declared_keys_only() -> None:
    reference = {stage: flat(OmegaConf.load(distill_recipe("hubert_base", stage))) for stage in (1, 2)}
    for family in FAMILIES:
        for stage in (1, 2):
            values = flat(OmegaConf.load(distill_recipe(family, stage)))
            assert list(values) == list(reference[stage]), f"{family}, stage {stage}: other keys, or in another order"
            differing = {key for key in values if values[key] != reference[stage][key]}
            assert differing <= {"hydra.run.dir", "hydra.sweep.dir", "task.normalize", "model.distill_layers"}
    differing = {key for key in reference[1] if reference[1][key] != reference[2].get(key)}
    assert differing == {
        *("hydra.sweep.dir", "hydra.sweep.subdir"),
        *("hydra.run.dir", "criterion.target_sparsity", "criterion.sparsity_warmup", "optimization.max_update"),
        *("optimization.lr", "lr_scheduler.warmup_updates", "model.student_path", "model.prune_units"),
    }


@pytest.mark.parametrize("hours", HOURS)
def test_fine_tuning_has_the_values_of_fairseqs_own_recipe(hours: str) -> None:
    stock = Path(fairseq.__file__).parent / "examples" / "wav2vec" / "config" / "finetuning" / f"base_{hours}.yaml"
    published = flat(OmegaConf.load(stock))
    ours = flat(OmegaConf.load(ROOT / "config" / "finetuning" / f"librispeech_{hours}.yaml"))
    defaults = {"dataset.validate_after_updates": 0, "dataset.validate_interval": 1, "checkpoint.save_interval": 1}
    # our task; and all visible GPUs instead of two
    differing = {key for key, value in published.items() if key not in ours or ours[key] != value}
    assert differing == {"task._name", "distributed_training.distributed_world_size"}
    for key, value in defaults.items():
        assert ours[key] == published.get(key, value)


def test_s3_routers_fine_tuning_differs_from_fairseqs_in_the_published_values() -> None:
    stock = Path(fairseq.__file__).parent / "examples" / "wav2vec" / "config" / "finetuning" / "base_1h.yaml"
    published = flat(OmegaConf.load(stock))
    ours = flat(OmegaConf.load(ROOT / "config" / "s3_router" / "base_1h.yaml"))
    differing = {key: ours.get(key) for key, value in published.items() if ours.get(key) != value}
    assert differing == {
        **{"task._name": "audio_ctc", "model._name": "wav2vec_ctc_st", "model.freeze_finetune_updates": 0},
        **{"optimization.max_update": 15000, "checkpoint.save_interval": 10000},
        **{"dataset.validate_after_updates": 0, "dataset.validate_interval": 10000},
    }
    assert ours["model.dropout"] == ours["model.attention_dropout"] == 0.1


# --- training


def write_corpus(folder: Path, seed: int = 1) -> Path:
    """Noise of 2 to 3 s with labels: 6 + 2 utterances, no speech."""
    rng = np.random.default_rng(seed)
    for split, number in (("train", 6), ("valid", 2)):
        (folder / split).mkdir(parents=True)
        entries = []
        for i in range(number):
            num_samples = int(rng.integers(2 * SAMPLE_RATE, 3 * SAMPLE_RATE))
            name = f"{split}/{i}.flac"
            soundfile.write(folder / name, 0.1 * rng.standard_normal(num_samples), SAMPLE_RATE, subtype="PCM_16")
            entries.append((name, num_samples))
        write_manifest(folder / f"{split}.tsv", ".", entries)
        (folder / f"{split}.ltr").write_text("E T | A T E |\n" * number)
    (folder / "dict.ltr.txt").write_text("".join(f"{letter} 6\n" for letter in checkpoints.LETTERS))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose PATH has this Python's commands; `s3distill` too, if the package is not installed."""
    folder = tmp_path_factory.mktemp("bin")
    shim = folder / "s3distill"
    shim.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m s3distill.cli.main "$@"\n')
    shim.chmod(0o755)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], str(folder)])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(command: list[Any], env: dict[str, str]) -> str:
    """Runs a command from the root of the repository and returns what it printed."""
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"exit status {done.returncode}; the end of the output:\n{done.stdout[-4000:]}"
    return done.stdout


def train_command(recipe: Path, *overrides: str) -> list[str]:
    folder = recipe.parent.relative_to(ROOT)
    return ["fairseq-hydra-train", "--config-dir", str(folder), "--config-name", recipe.stem, *overrides]


# what a machine without a GPU needs, and one small update
SMALL_RUN = (
    *("common.fp16=false", "common.log_interval=1", "dataset.num_workers=0", "dataset.max_tokens=100000"),
    *("optimization.max_update=1", "lr_scheduler.warmup_updates=0"),  # with a warm-up, the first update has lr 0
)


@pytest.fixture(scope="module")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The real commands as children of a process that has imported fairseq already."""
    from tests.end_to_end.conftest import Server

    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    server.process.wait(timeout=30)


# family of the recipe -> (fairseq's model, its shape at a width of 32)
_BASE = {**checkpoints.SMALL, "encoder_layers": 12}
_LARGE = {**checkpoints.LARGE, **checkpoints.SMALL, "encoder_layers": 24}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "hubert_base": ("hubert", _BASE),
    "hubert_large": ("hubert", _LARGE | {"conv_bias": False}),
    "wav2vec2_base": ("wav2vec2", _BASE),
    "wav2vec2_large": ("wav2vec2", _LARGE),
    "data2vec_base": ("data2vec_audio", _BASE),
    "wavlm_base_plus": ("wavlm", _BASE),
}


def write_teacher(path: Path, family: str) -> Path:
    model, shape = SHAPES[family]
    normalize = bool(OmegaConf.load(distill_recipe(family, 1)).task.normalize)
    if model == "wavlm":  # fairseq has none: the layout of the released files
        return checkpoints.save(folders.released_wavlm({**folders.BASE_CFG, **shape, "normalize": normalize}), path)
    state, _ = checkpoints.pretrained(model, shape, normalize=normalize)
    return checkpoints.save(state, path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES[1:])  # hubert_base has the two tests below
def test_both_stages_train_on_a_checkpoint_of_the_family(
    family: str, corpus: Path, tmp_path: Path, fork_server: Any
) -> None:
    teacher = write_teacher(tmp_path / "teacher.pt", family)
    compact = tmp_path / "compact.pt"
    paths = [f"task.data={corpus}", f"task.teacher_path={teacher}", "task.teacher_dtype=float32"]
    # more closed gates at the start, so that there is something to cut; large shapes train with recomputed layers
    more = ["model.gate_init_drop=0.6", f"model.checkpoint_activations={str(family.endswith('large')).lower()}"]
    out = {stage: tmp_path / f"stage{stage}" for stage in (1, 2)}
    last = {stage: out[stage] / "checkpoints" / "checkpoint_last.pt" for stage in out}

    first = train_command(distill_recipe(family, 1), f"hydra.run.dir={out[1]}", *paths, *more, *SMALL_RUN)
    fork_server.run(*first).succeeded()
    fork_server.run("s3distill", "prune", last[1], compact).succeeded()
    second = train_command(
        distill_recipe(family, 2), f"hydra.run.dir={out[2]}", *paths, f"model.student_path={compact}", *SMALL_RUN
    )
    log = fork_server.run(*second).succeeded().output
    assert "its heads come along" in log

    states = {path: compat.load_checkpoint(path) for path in (last[1], compact, last[2])}
    gated, cut, done = (states[path]["model"] for path in (last[1], compact, last[2]))
    for state in (states[last[1]], states[last[2]]):
        assert state["optimizer_history"][-1]["num_updates"] == 1
        assert not any("teacher" in key for key in state["model"])
    assert "lagrangian.lambda1" in gated and "gates.ffn.11.log_alpha" in gated
    assert not any(key.startswith(("gates.", "lagrangian.")) for key in done)
    # two heads: one of layer 0, one that the others share
    assert {key for key in done if key.startswith("heads.")} == {
        f"heads.linears.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    }
    assert cut.keys() == done.keys()
    assert all(torch.isfinite(value).all() for value in done.values())
    learned = [key for key in done if not torch.equal(cut[key], done[key])]
    assert "feature_extractor.conv_layers.0.0.weight" in learned and "heads.linears.1.weight" in learned

    before, after = (EncoderConfig.from_json(states[p]["cfg"]["model"]["encoder"]) for p in (last[1], last[2]))
    sizes = [count_parameters(config, GateCounts.full(config)) for config in (before, after)]
    assert sizes[1] < 0.9 * sizes[0], "nothing was cut"
    model = s3distill.load(last[2])
    assert len(model(torch.randn(1, 16000), None).hidden_states) == before.num_layers + 1


@pytest.mark.slow
def test_a_hubert_base_trains_one_update_and_is_pruned(corpus: Path, tmp_path: Path, binaries: dict[str, str]) -> None:
    """The real shape, 94 million parameters, through the real commands."""
    state, _ = checkpoints.pretrained("hubert", checkpoints.BASE)
    teacher = checkpoints.save(state, tmp_path / "hubert_base_ls960.pt")
    del state
    compact = tmp_path / "compact.pt"
    try:
        overrides = [
            *(f"hydra.run.dir={tmp_path}/stage1", f"task.data={corpus}", f"task.teacher_path={teacher}"),
            *(
                "task.teacher_dtype=float32",
                "dataset.disable_validation=true",
                "checkpoint.no_save_optimizer_state=true",
            ),
        ]
        log = run(train_command(distill_recipe("hubert_base", 1), *overrides, *SMALL_RUN), binaries)
        assert '"num_updates": "1"' in log
        last = tmp_path / "stage1" / "checkpoints" / "checkpoint_last.pt"
        options = compat.load_checkpoint(last)["cfg"]["model"]
        assert options["reference_cost"] == 94_371_712
        printed = run(["s3distill", "prune", last, compact], binaries)
        assert "relative error" in printed
        assert compact.stat().st_size > 300e6  # after one update the gates are as good as open
    finally:
        for file in (teacher, compact, tmp_path / "stage1"):  # a gigabyte that nobody wants to keep
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)


@pytest.mark.slow
def test_the_example_runs_from_start_to_end(corpus: Path, tmp_path: Path, binaries: dict[str, str]) -> None:
    """examples/dphubert/run.sh with one update per training."""
    teacher = write_teacher(tmp_path / "teacher.pt", "hubert_base")
    script, out = ROOT / "examples" / "dphubert" / "run.sh", tmp_path / "out"
    small = [option for option in SMALL_RUN if "warmup" not in option]
    env = binaries | {
        **{"DATA": str(corpus), "LABELLED": str(corpus), "TEACHER": str(teacher), "OUT": str(out), "TEST": "valid"},
        "FINETUNE": "librispeech_10h",
        "ARGS": " ".join(small),
        "STAGE1_ARGS": "task.teacher_dtype=float32 lr_scheduler.warmup_updates=0 model.gate_init_drop=0.3",
        "STAGE2_ARGS": "task.teacher_dtype=float32 lr_scheduler.warmup_updates=0",
        "FINETUNE_ARGS": "optimization.max_update=2 dataset.valid_subset=valid model.mask_channel_length=8",
        "DECODE_ARGS": "--cpu",
    }
    run([script], env)
    assert (out / "decode" / "scores-valid.json").is_file()
    tuned = s3distill.load(out / "finetune" / "checkpoints" / "checkpoint_last.pt")
    logits = tuned(torch.randn(1, 16000), None).logits
    assert logits is not None and logits.shape[-1] == 4 + len(checkpoints.LETTERS)
    again = run([script], env)
    assert again.count("done before") == 6


@pytest.mark.slow
def test_the_sweep_trains_each_size_and_reports(corpus: Path, tmp_path: Path, binaries: dict[str, str]) -> None:
    """examples/dphubert/sweep.sh: stage 1 by hydra's multirun, then one size after the other to its end."""
    teacher = write_teacher(tmp_path / "teacher.pt", "hubert_base")
    script, out = ROOT / "examples" / "dphubert" / "sweep.sh", tmp_path / "out"
    env = binaries | {
        **{"DATA": str(corpus), "TEACHER": str(teacher), "OUT": str(out), "SPARSITIES": "0.3 0.6"},
        "ARGS": " ".join(option for option in SMALL_RUN if "warmup" not in option and "target_sparsity" not in option),
        "STAGE1_ARGS": "task.teacher_dtype=float32 lr_scheduler.warmup_updates=0 model.gate_init_drop=0.3",
    }
    run([script], env)
    jobs = [out / "stage1" / f"sparsity_{sparsity}" for sparsity in ("0.3", "0.6")]
    for job in jobs:
        assert (job / "checkpoints" / "checkpoint_last.pt").is_file()
        assert compat.load_checkpoint(job / "checkpoints" / "checkpoint_last.pt")["cfg"]["criterion"][
            "target_sparsity"
        ] == float(job.name.removeprefix("sparsity_"))
    rows = (out / "report.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["name", "teacher", "sparsity_0.3", "sparsity_0.6"]

    labelled = {
        **{"LABELLED": str(corpus), "TEST": "valid", "FINETUNE": "librispeech_10h", "DECODE_ARGS": "--cpu"},
        "STAGE2_ARGS": "task.teacher_dtype=float32 lr_scheduler.warmup_updates=0",
        "FINETUNE_ARGS": "optimization.max_update=2 dataset.valid_subset=valid model.mask_channel_length=8",
    }
    again = run([script], env | labelled)
    assert "[sweep] done before" in again
    rows = [row.split(",") for row in (out / "report.csv").read_text().splitlines()]
    assert rows[0][5] == "wer" and all(float(row[5]) > 0 for row in rows[2:]), "decoded"


@pytest.mark.parametrize(
    ("script", "usage"), [("run.sh", "DATA=DIR TEACHER=FILE LABELLED=DIR"), ("sweep.sh", "DATA=DIR TEACHER=FILE")]
)
def test_the_example_says_what_it_needs(script: str, usage: str, binaries: dict[str, str]) -> None:
    done = subprocess.run(
        [ROOT / "examples" / "dphubert" / script], env={"PATH": binaries["PATH"]}, capture_output=True, text=True
    )
    assert done.returncode == 2 and f"usage: {usage}" in done.stderr
