"""`s3distill train ARGS`: `fairseq-hydra-train ARGS`, with devices, paths, option names and manifests checked first."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from s3distill.data.manifest import validate_for_training

TAKES_ANY_ARGUMENTS = True  # they are fairseq-hydra-train's
PATHS = (
    *("model.w2v_path", "model.student_path", "model.latency_table", "task.teacher_path", "task.data"),
    *("checkpoint.finetune_from_model", "checkpoint.restore_file"),
)
_OWN_CHECKPOINT = "checkpoint_last.pt"  # looked for in the run's own folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs="*", metavar="ARGS", help="what fairseq-hydra-train takes")


def run(args: argparse.Namespace) -> int:
    try:
        from fairseq_cli import hydra_train

        from s3distill.compat import launch
    except ImportError as error:
        raise RuntimeError(f"training needs fairseq ({error}); run: make env") from error
    check_option_names(args.arguments)
    launch.prepare(check_files)
    sys.argv = ["fairseq-hydra-train", *args.arguments]
    hydra_train.cli_main()
    return 0


def check_option_names(arguments: list[str]) -> None:
    """Refuses options that the recipe does not list, with the names that come near.

    Raises:
        FileNotFoundError: there is no such recipe. ValueError: it has no such option.
    """
    from fairseq.dataclass.configs import FairseqConfig
    from omegaconf import OmegaConf

    folder, name = _value(arguments, "--config-dir", "-cd"), _value(arguments, "--config-name", "-cn")
    if folder is None or name is None:
        return  # fairseq's own default configuration
    recipe = Path(folder) / f"{name.removesuffix('.yaml')}.yaml"
    if not recipe.is_file():
        recipes = sorted(p.stem for p in recipe.parent.glob("*.yaml"))
        there = f"there are {', '.join(recipes)}" if recipes else "there is no recipe in that folder"
        raise FileNotFoundError(f"--config-dir {folder} --config-name {name}: {recipe} does not exist; {there}")
    known = set(_keys(OmegaConf.to_container(read_recipe(recipe, arguments))))
    known |= set(_keys(OmegaConf.to_container(OmegaConf.structured(FairseqConfig))))
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals or key.startswith(("+", "~", "-", "hydra.")) or "/" in key or "@" in key or key in known:
            continue
        if (recipe.parent / key).is_dir():
            continue  # which file of that folder: hydra says so where there is none
        near = difflib.get_close_matches(key, known, n=3)
        raise ValueError(
            f"{recipe} has no option `{key}`; {'did you mean ' + ' or '.join(near) + '?' if near else ''} An option that it does not list "
            f"can be added with ++{argument}"
        )


def read_recipe(recipe: Path, arguments: Sequence[str] = ()) -> Any:
    """A recipe as it is written, with what it takes from the folders beside it on top.

    Args:
        arguments: ``FOLDER=NAME`` chooses another file than ``defaults`` of the recipe name, ``+FOLDER=NAME`` one that they do not.
    Returns:
        the merged configuration, without ``defaults``.
    """
    from omegaconf import OmegaConf

    own = OmegaConf.load(recipe)
    assert OmegaConf.is_dict(own), f"{recipe} must hold keys and values"
    chosen = {k: v for item in own.pop("defaults", []) if item != "_self_" for k, v in item.items()}
    for argument in arguments:
        folder, _, name = argument.lstrip("+").partition("=")
        if folder in chosen or (argument.startswith("+") and (recipe.parent / folder).is_dir()):
            chosen[folder] = name
    files = [recipe.parent / folder / f"{name}.yaml" for folder, name in chosen.items()]
    return OmegaConf.merge(own, *(OmegaConf.load(file) for file in files if file.is_file()))


def _value(arguments: list[str], *names: str) -> str | None:
    for i, argument in enumerate(arguments):
        for name in names:
            if argument == name and i + 1 < len(arguments):
                return arguments[i + 1]
            if argument.startswith(f"{name}="):
                return argument.partition("=")[2]
    return None


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    for key, value in values.items() if isinstance(values, dict) else ():
        yield f"{prefix}{key}"
        yield from _keys(value, f"{prefix}{key}.")


def check_files(cfg: Any) -> None:
    """Refuses a run whose checkpoints or manifests are not there or not whole (`FileNotFoundError`, `ValueError`)."""
    from omegaconf import OmegaConf

    for key in PATHS:
        section, _, name = key.partition(".")
        if OmegaConf.is_dict(cfg.get(section)) and OmegaConf.is_missing(cfg[section], name):
            raise ValueError(f"`{key}` must be given, but the command does not set it; pass {key}=PATH")
        path = OmegaConf.select(cfg, key)
        if key == "checkpoint.restore_file" and path == _OWN_CHECKPOINT:
            continue
        if path and not Path(path).exists():
            raise FileNotFoundError(
                f"`{key}` must name what exists, but there is no {path} (from {Path.cwd()}); check the path"
            )
    task, data = cfg.get("task") or {}, OmegaConf.select(cfg, "task.data")
    if not data or task.get("multi_corpus_keys") or task.get("binarized_dataset"):
        return
    subsets = [cfg.dataset.train_subset]
    if not cfg.dataset.get("disable_validation"):
        subsets += str(cfg.dataset.valid_subset).split(",")
    labels = task.get("labels")
    has_dictionary = labels and task.get("_name") != "audio_labels"  # which may take its classes from elsewhere
    for subset in map(str.strip, subsets):
        label_path = Path(data) / f"{subset}.{labels}" if labels else None
        dictionary = Path(task.get("target_dictionary") or data) / f"dict.{labels}.txt" if has_dictionary else None
        validate_for_training(Path(data) / f"{subset}.tsv", label_path, dictionary)
