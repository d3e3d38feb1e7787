"""Fused kernels under every layer and optimizer: apex's where they are compiled in, else torch's own.

apex's compiled extension modules are probed (``fused_layer_norm_cuda``, ``amp_C``, ``xentropy_cuda``), never the name
``apex`` alone: an unrelated package of that name exists. `report` says what is in use, for ``s3distill doctor``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ADAMW_DEVICES = ("cuda", "cpu", "mps", "xpu")  # where torch.optim.AdamW has a fused step
_APEX_ADAM_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt
_CHUNK_SIZE = 2048 * 32  # elements per thread block of multi_tensor_l2norm, as apex and fairseq call it


@dataclass(frozen=True)
class KernelReport:
    """Which implementation an operation has on this machine.

    Attributes:
        name: the operation.
        in_use: whether apex's compiled kernel is what CUDA tensors get.
        implementation: what is called.
        why: the reason, with the fault of a compiled kernel that is there but does not load.
    """

    name: str
    in_use: bool
    implementation: str
    why: str


@dataclass(frozen=True)
class _Kernel:
    """A kernel of apex: the function or class to call (None: not usable) and the reason."""

    call: Callable[..., Any] | None
    why: str


@functools.cache
def _probe(extension: str, function: str, module: str, name: str) -> _Kernel:
    """Looks for ``function`` in the compiled ``extension``, and only then for its wrapper ``name`` in apex's ``module``."""
    try:
        compiled = importlib.import_module(extension)
    except ModuleNotFoundError:
        return _Kernel(None, f"apex's compiled {extension} is not installed")
    except (ImportError, OSError) as error:
        return _Kernel(None, f"apex's compiled {extension} does not load with torch {torch.__version__}: {error}")
    if not hasattr(compiled, function):
        return _Kernel(None, f"apex's compiled {extension} has no {function}")
    try:
        return _Kernel(getattr(importlib.import_module(module), name), f"apex's compiled {extension} is installed")
    except (ImportError, OSError, AttributeError) as error:
        return _Kernel(None, f"{extension} is compiled, but {module}.{name} of apex cannot be imported: {error}")


def _apex_layer_norm() -> _Kernel:
    module = "apex.normalization.fused_layer_norm"
    return _probe("fused_layer_norm_cuda", "forward_affine", module, "fused_layer_norm_affine")


def _apex_adam() -> _Kernel:
    return _probe("amp_C", "multi_tensor_adam", "apex.optimizers", "FusedAdam")


def _apex_l2norm() -> _Kernel:
    return _probe("amp_C", "multi_tensor_l2norm", "amp_C", "multi_tensor_l2norm")


def _apex_cross_entropy() -> _Kernel:
    return _probe("xentropy_cuda", "forward", "apex.contrib.xentropy", "SoftmaxCrossEntropyLoss")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off for what is computed in the type that it comes in: losses, statistics, the teacher.

    Matrix products of float32 tensors are among what autocast rounds, whatever they are part of.
    """
    if is_autocast(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for tensors of this device; some kinds of device have none."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


@functools.cache
def keep_freed_memory() -> bool:
    """Makes the C library keep the memory of freed tensors for the next ones, for the rest of this process.

    glibc gives every block above 128 KiB to 32 MiB back to the kernel, and the next update pays for fresh, zeroed pages:
    a tenth of the time of a training step on a CPU. In return the process stays as large as it once was.

    Returns:
        Whether the C library is one that can (glibc).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and mallopt(_M_MMAP_MAX, 0) == 1 and mallopt(_M_TRIM_THRESHOLD, -1) == 1


def return_freed_memory() -> bool:
    """Gives the pages of freed tensors back to the kernel once; `keep_freed_memory` goes on for what is freed later.

    For the end of the first update: the optimizer's states, which it makes, lie among activations that are free again, and what
    does not fit between them would stay unused.

    Returns:
        Whether there were any; False too where the C library is not glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return trim is not None and trim(ctypes.c_size_t(0)) == 1


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm, y = (x - mean) / sqrt(var + eps) * weight + bias, over the last ``len(normalized_shape)`` dimensions.

    apex's kernel takes CUDA tensors that have the type of their weight and bias. Under autocast and in compiled or
    exported graphs torch's own is called: it keeps the output float32 there, and graphs can hold it.

    Args:
        x: [..., *normalized_shape].
        weight, bias: normalized_shape, or None.
    Returns:
        As ``x``.
    """
    shape = list(normalized_shape)
    if x.is_cuda and weight is not None and bias is not None and x.dtype == weight.dtype == bias.dtype:
        graph_or_autocast = torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda")
        fused = None if graph_or_autocast else _apex_layer_norm().call
        if fused is not None:
            result: Tensor = fused(x, weight, bias, torch.Size(shape), eps)
            return result
    return F.layer_norm(x, shape, weight, bias, eps)


def fused_adamw(
    params: Iterable[Tensor] | Iterable[dict[str, Any]],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, 2019): apex's FusedAdam for CUDA parameters where it is compiled in, else torch's fused AdamW.

    A state that one of the two saved can be loaded into the other, so a run resumes on another machine.

    Args:
        params: parameters, or groups as `torch.optim` takes them.
        weight_decay: decoupled; a group may have its own, like its own ``lr``.
    Raises:
        ValueError: there are no parameters.
    """
    groups = _as_groups(params)
    members = [p for group in groups for p in group["params"]]
    options: dict[str, Any] = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
    optimizer: torch.optim.Optimizer
    if all(p.is_cuda and p.dtype in _APEX_ADAM_TYPES for p in members) and (apex_adam := _apex_adam().call) is not None:
        optimizer = apex_adam(groups, adam_w_mode=True, **options)
    else:
        has_fused_step = all(p.device.type in _ADAMW_DEVICES and p.is_floating_point() for p in members)
        optimizer = torch.optim.AdamW(groups, fused=True if has_fused_step else None, **options)
    optimizer.register_load_state_dict_pre_hook(_translate_adam_state)
    return optimizer


def _as_groups(params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    listed: list[Any] = list(params)
    groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    groups = [{**group, "params": list(group["params"])} for group in groups]
    if not any(group["params"] for group in groups):
        raise ValueError("AdamW needs at least one parameter, but `params` is empty; pass model.parameters()")
    return groups


def _translate_adam_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """apex counts updates per group, torch per parameter: adds whichever count and options the other left out."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    state = {index: dict(values) for index, values in state_dict["state"].items()}
    for group in groups:
        for option, value in optimizer.defaults.items():
            group.setdefault(option, value)
        with_state = [state[index] for index in group["params"] if index in state]
        latest = max((int(values.get("step", 0)) for values in with_state), default=0)
        # whichever of the two counted last is ahead: the other's count was carried along, and stands still
        apex_counted_last = int(group.get("step", 0)) > latest
        group["step"] = max(int(group.get("step", 0)), latest)
        for values in with_state:
            if apex_counted_last or "step" not in values:
                values["step"] = torch.tensor(float(group["step"]), dtype=torch.float32)
    return {**state_dict, "state": state, "param_groups": groups}


@torch.no_grad()
def clip_grad_norm(params: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients in place by min(1, max_norm / (norm + 1e-6)), with norm the L2 norm of all of them together.

    The norm is apex's multi_tensor_l2norm for CUDA gradients of one type on one device where it is compiled in, else torch's
    foreach functions.

    Args:
        params: those without a gradient are left out.
        max_norm: above 0; ``math.inf`` only measures.
    Returns:
        The norm before scaling, scalar, on the gradients' device (0 without gradients).
    """
    if not max_norm > 0:
        raise ValueError(f"`max_norm` must be above 0, but is {max_norm}; pass math.inf to measure without clipping")
    params = [p for p in params if p.grad is not None]
    norm = _total_norm([p.grad for p in params if p.grad is not None])
    # on a CPU it costs nothing to look, and a pass over all gradients where nothing is to be scaled
    if not math.isinf(max_norm) and (norm.is_cuda or not norm + 1e-6 <= max_norm):
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm


def _total_norm(grads: list[Tensor]) -> Tensor:
    one_kind = len({(grad.device, grad.dtype) for grad in grads}) == 1 and grads[0].is_cuda
    l2norm = _apex_l2norm().call if one_kind else None
    if l2norm is None:
        return torch.nn.utils.get_total_norm(grads)
    with torch.cuda.device(grads[0].device):
        overflow = torch.zeros(1, dtype=torch.int, device=grads[0].device)
        total: Tensor = l2norm(_CHUNK_SIZE, overflow, [grads], False)[0]
    return total.reshape(())


def report() -> list[KernelReport]:
    """What every operation with a fused kernel runs on, on this machine; loads apex's extensions where they are."""
    rows = (
        ("layer_norm", _apex_layer_norm(), "apex fused_layer_norm", "torch layer_norm"),
        ("adamw", _apex_adam(), "apex FusedAdam", "torch AdamW, fused"),
        ("clip_grad_norm", _apex_l2norm(), "apex multi_tensor_l2norm", "torch clip_grad_norm, foreach"),
        (
            "cross_entropy",
            _apex_cross_entropy(),
            "apex xentropy, in fairseq",
            "torch log_softmax and nll_loss, in fairseq",
        ),
    )
    found = [_row(name, kernel, apex, plain) for name, kernel, apex, plain in rows]
    sdpa = "torch scaled_dot_product_attention"
    return [*found, KernelReport("attention", False, sdpa, "torch picks flash, memory-efficient or plain by itself")]


def _row(name: str, kernel: _Kernel, apex: str, plain: str) -> KernelReport:
    if kernel.call is None:
        return KernelReport(name, False, plain, kernel.why)
    if not torch.cuda.is_available():
        return KernelReport(name, False, plain, f"{kernel.why}, but there is no CUDA device")
    return KernelReport(name, True, apex, kernel.why)
