"""`s3distill doctor`: versions, devices, fused kernels, registered names, and what is missing with its remedy."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from s3distill.cli.path import package_path

INSTALL_FAIRSEQ = (
    "pip install torch setuptools wheel cython numpy ninja && pip install --no-build-isolation 's3distill[train]' "
    "(needs a C++ compiler)"
)
REGISTRIES = {  # folder of the package -> fairseq's module and its registry; the file name is the registered name
    "models": ("fairseq.models", "MODEL_REGISTRY"),
    "tasks": ("fairseq.tasks", "TASK_REGISTRY"),
    "criterions": ("fairseq.criterions", "CRITERION_REGISTRY"),
    "optim": ("fairseq.optim", "OPTIMIZER_REGISTRY"),
    "scoring": ("fairseq.scoring", "SCORER_REGISTRY"),
}


@dataclass(frozen=True)
class Library:
    """Something that s3distill uses.

    Attributes:
        module: imported to see whether it loads where it is essential, otherwise only looked for.
        distributions: names that it is installed under.
        purpose: what does not work without it.
        remedy: the command that installs it.
    """

    module: str
    distributions: tuple[str, ...]
    purpose: str
    remedy: str
    is_essential: bool = False


# torchaudio is not here: nothing needs it, and beside a CPU torch its import ends in an OSError.
LIBRARIES = (
    Library("torch", ("torch",), "everything", "pip install 'torch>=2.6'", is_essential=True),
    Library("numpy", ("numpy",), "everything", "pip install numpy", is_essential=True),
    Library("soundfile", ("soundfile",), "reading audio", "pip install --force-reinstall soundfile", is_essential=True),
    Library("tqdm", ("tqdm",), "progress bars", "pip install tqdm"),
    Library("jiwer", ("jiwer",), "word error rates", "pip install jiwer"),
    Library("fairseq", ("fairseq-fixed", "fairseq"), "training and fairseq-generate", INSTALL_FAIRSEQ),
    Library("hydra", ("hydra-core",), "training and fairseq-generate", INSTALL_FAIRSEQ),
    Library("omegaconf", ("omegaconf",), "training and fairseq-generate", INSTALL_FAIRSEQ),
    Library("editdistance", ("editdistance",), "fine-tuning with fairseq's ctc criterion", "pip install editdistance"),
    Library("tensorboardX", ("tensorboardX",), "training curves in TensorBoard", "pip install tensorboardX"),
    Library(
        "espeakng_loader", ("espeakng-loader",), "s3distill demo-data and quickstart", "pip install 's3distill[demo]'"
    ),
    Library("scipy", ("scipy",), "s3distill demo-data and quickstart", "pip install 's3distill[demo]'"),
    Library("matplotlib", ("matplotlib",), "plots of the report", "pip install 's3distill[plots]'"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Prints the findings; status 1 if something essential is broken, else 0."""
    findings = examine()
    print(json.dumps(findings, indent=2) if args.json else describe(findings))
    return 0 if findings["ok"] else 1


def examine() -> dict[str, Any]:
    """All findings, in plain types: ``ok``, ``versions``, ``devices``, ``kernels``, ``user_dir``, ``registered``, ``faults``."""
    faults = [fault for fault in map(_fault, LIBRARIES) if fault is not None]
    torch_loads = not any(fault["name"] == "torch" for fault in faults)
    registered: dict[str, dict[str, bool]] = {}
    if importlib.util.find_spec("fairseq") is not None:
        registered, registration_faults = _registered_names()
        faults += registration_faults
    return {
        "ok": not any(fault["is_essential"] for fault in faults),
        "versions": _versions(),
        "devices": _devices() if torch_loads else {},
        "kernels": _kernels() if torch_loads else [],
        "user_dir": {"path": package_path(), "resolves_from_any_folder": _resolves_anywhere()},
        "registered": registered,
        "faults": faults,
    }


def _fault(library: Library) -> dict[str, Any] | None:
    fault = {"name": library.module, "needed_for": library.purpose, "remedy": library.remedy}
    if importlib.util.find_spec(library.module) is None:
        return {**fault, "is_essential": library.is_essential, "why": "not installed"}
    if library.is_essential:
        try:
            importlib.import_module(library.module)
        except (ImportError, OSError) as error:  # OSError: a shared library that it loads is missing
            return {**fault, "is_essential": True, "why": f"does not load: {error}"}
    return None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "s3distill": _version(("s3distill",))}
    return found | {library.distributions[0]: _version(library.distributions) for library in LIBRARIES}


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if name == distributions[0] else f"{version} ({name})"
    return None


def _devices() -> dict[str, Any]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append(
            {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1), "capability": capability}
        )
    return {
        "platform": platform.platform(),
        "cpu_cores": usable,
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
    }


def _kernels() -> list[dict[str, Any]]:
    from s3distill import kernels, products

    return [asdict(row) for row in (*kernels.report(), products.report())]


def _resolves_anywhere() -> bool:
    """Whether ``common.user_dir=s3distill`` works from any folder: fairseq looks beside its own package."""
    spec = importlib.util.find_spec("fairseq")
    return bool(spec and spec.origin and (Path(spec.origin).parents[1] / "s3distill").is_dir())


def _registered_names() -> tuple[dict[str, dict[str, bool]], list[dict[str, Any]]]:
    """Folder -> name -> whether fairseq knows it as ours, and the faults."""
    found: dict[str, dict[str, bool]] = {}
    faults: list[dict[str, Any]] = []
    for folder, (module, registry_name) in REGISTRIES.items():
        names = sorted(file.stem for file in Path(package_path(), folder).glob("*.py") if not file.stem.startswith("_"))
        if not names:
            continue
        try:
            registry = getattr(importlib.import_module(module), registry_name)
        except (ImportError, OSError, AttributeError) as error:
            faults.append(_registration_fault(folder, f"{module} does not load: {error}"))
            continue
        owners = {name: getattr(registry.get(name), "__module__", None) for name in names}
        found[folder] = {name: owner == f"s3distill.{folder}.{name}" for name, owner in owners.items()}
        for name, owner in owners.items():
            if not found[folder][name]:
                why = "is not registered" if owner is None else f"is registered by {owner} instead of s3distill"
                faults.append(_registration_fault(f"{folder}/{name}", why))
    return found, faults


def _registration_fault(name: str, why: str) -> dict[str, Any]:
    purpose = "fairseq-hydra-train common.user_dir=s3distill"
    return {"name": name, "why": why, "needed_for": purpose, "remedy": INSTALL_FAIRSEQ, "is_essential": True}


def describe(findings: dict[str, Any]) -> str:
    """The findings as text."""
    user_dir = findings["user_dir"]
    anywhere = user_dir["resolves_from_any_folder"]
    hint = (
        "common.user_dir=s3distill works from any folder"
        if anywhere
        else 'common.user_dir=s3distill works beside this folder; from elsewhere use common.user_dir="$(s3distill path)"'
    )
    lines = ["versions", *(f"  {name:16} {version or '-'}" for name, version in findings["versions"].items())]
    lines += ["devices", *_device_lines(findings["devices"])]
    lines += ["kernels", *(f"  {row['name']:16} {row['implementation']} ({row['why']})" for row in findings["kernels"])]
    lines += ["plugin", f"  {'folder':16} {user_dir['path']}", f"  {'':16} {hint}"]
    for folder, names in findings["registered"].items():
        lines.append(
            f"  {folder:16} " + ", ".join(name if known else f"{name} (MISSING)" for name, known in names.items())
        )
    if not findings["faults"]:
        return "\n".join([*lines, "nothing is missing"])
    lines.append("missing")
    for fault in findings["faults"]:
        mark = "ERROR " if fault["is_essential"] else ""
        lines += [
            f"  {mark}{fault['name']}: {fault['why']}; needed for {fault['needed_for']}",
            f"    {fault['remedy']}",
        ]
    return "\n".join(lines)


def _device_lines(devices: dict[str, Any]) -> list[str]:
    if not devices:
        return ["  unknown, because torch does not load"]
    lines = [
        f"  {'CPU':16} {devices['cpu_cores']} cores, torch uses {devices['torch_threads']} threads; {devices['platform']}"
    ]
    for gpu in devices["gpus"]:
        lines.append(f"  {'GPU':16} {gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}")
    if not devices["gpus"]:
        build = (
            f"this torch is built for CUDA {devices['cuda']}"
            if devices["cuda"]
            else "this torch is built for the CPU only"
        )
        lines.append(f"  {'GPU':16} none that torch can use ({build})")
    return lines
