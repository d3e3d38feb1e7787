"""Kernels: the same numbers as plain torch, whichever implementation runs, and the right one is chosen."""

from __future__ import annotations

import copy
import math
import platform
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s3distill import kernels

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
APEX_EXTENSIONS = ("fused_layer_norm_cuda", "amp_C", "xentropy_cuda")


@pytest.fixture(autouse=True)
def _fresh_probe():
    kernels._probe.cache_clear()
    yield
    kernels._probe.cache_clear()


@pytest.fixture
def no_apex(monkeypatch):
    for name in [*APEX_EXTENSIONS, *(m for m in sys.modules if m.split(".")[0] == "apex")]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Hide(APEX_EXTENSIONS), *sys.meta_path])


class _Hide:
    """An import hook that hides modules, so that a machine with apex tests the same."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def _module(monkeypatch, name, **attributes):
    module = types.ModuleType(name)
    module.__path__ = []
    for key, value in attributes.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def _row(name):
    return {row.name: row for row in kernels.report()}[name]


def _model_and_grads(device="cpu", seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(device)
    model(torch.randn(4, 6, device=device)).square().sum().backward()
    return model


def test_layer_norm_is_the_equation():
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*shape, generator=generator).double() for shape in ((2, 3, 7), (7,), (7,)))
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    torch.testing.assert_close(kernels.layer_norm(x, (7,), weight, bias), expected)
    torch.testing.assert_close(kernels.layer_norm(x, (7,)), (expected - bias) / weight)


def test_layer_norm_gradient():
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (3,), (3,)))
    assert torch.autograd.gradcheck(lambda *t: kernels.layer_norm(t[0], (3,), t[1], t[2]), (x, weight, bias))


def test_adamw_takes_the_steps_of_plain_adamw_in_every_group():
    model = _model_and_grads()
    reference = copy.deepcopy(model)
    options = {"betas": (0.8, 0.9), "eps": 1e-6}

    def groups(m):
        first, *rest = m.parameters()
        return [{"params": [first], "lr": 0.1}, {"params": rest, "weight_decay": 0.5, "lr_scale": 3.0}]

    ours = kernels.fused_adamw(groups(model), lr=0.01, **options)
    plain = torch.optim.AdamW(groups(reference), lr=0.01, weight_decay=0.0, foreach=False, fused=False, **options)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(5):
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            q.grad = p.grad.clone()
        ours.step()
        plain.step()
    for p, q, s in zip(model.parameters(), reference.parameters(), start, strict=True):
        torch.testing.assert_close(p, q)
        assert not torch.equal(p, s)
    assert ours.param_groups[0]["fused"], "the fused step of torch must be used on a CPU"
    assert ours.param_groups[1]["lr_scale"] == 3.0


def test_adamw_takes_parameters_from_a_generator_and_refuses_none():
    model = _model_and_grads()
    assert len(kernels.fused_adamw(model.parameters()).param_groups[0]["params"]) == 6
    with pytest.raises(ValueError, match=r"at least one parameter.*pass model.parameters\(\)"):
        kernels.fused_adamw([])


def test_adamw_resumes_from_a_state_that_apex_saved():
    model = _model_and_grads()
    resumed = copy.deepcopy(model)
    ours = kernels.fused_adamw(model.parameters(), lr=0.01)
    for _ in range(3):
        ours.step()
    saved = copy.deepcopy(ours.state_dict())
    resumed.load_state_dict(model.state_dict())
    options = {key: saved["param_groups"][0][key] for key in ("lr", "betas", "eps", "weight_decay", "params")}
    for values in saved["state"].values():
        del values["step"]  # apex counts per group
    apex_state = {"state": saved["state"], "param_groups": [{**options, "bias_correction": True, "step": 3}]}

    other = kernels.fused_adamw(resumed.parameters(), lr=0.5)
    other.load_state_dict(apex_state)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        q.grad = p.grad.clone()
    ours.step()
    other.step()
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert "step" not in apex_state["state"][0], "the caller's state must stay as it was"


def test_a_state_of_torch_gets_what_apex_needs():
    model = _model_and_grads()
    ours = kernels.fused_adamw(model.parameters(), lr=0.01)
    ours.step()
    ours.step()
    like_apex = types.SimpleNamespace(defaults={"lr": 1.0, "bias_correction": True})
    translated = kernels._translate_adam_state(like_apex, ours.state_dict())
    group = translated["param_groups"][0]
    assert (group["step"], group["bias_correction"], group["lr"]) == (2, True, 0.01)


@pytest.mark.parametrize("max_norm", [0.1, 1e6, math.inf])
def test_clipping_is_that_of_plain_torch(max_norm):
    model, reference = _model_and_grads(), _model_and_grads()
    norm = kernels.clip_grad_norm(model.parameters(), max_norm)
    expected = torch.stack([p.grad.square().sum() for p in reference.parameters()]).sum().sqrt()
    torch.testing.assert_close(norm, expected)
    scale = min(1.0, max_norm / (float(expected) + 1e-6))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad * scale)


def test_clipping_without_gradients_and_without_a_limit():
    assert kernels.clip_grad_norm(nn.Linear(2, 2).parameters(), 1.0) == 0
    with pytest.raises(ValueError, match=r"`max_norm` must be above 0, but is 0; pass math.inf"):
        kernels.clip_grad_norm([], 0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these parameters")
def test_freed_memory_is_kept():
    """In a process of its own, which stays as large as it was; 40 blocks of 16 MiB are returned to the system without."""
    code = """
import sys, torch
from s3distill import kernels
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4 / 1024  # MiB
if sys.argv[1] == "keep": assert kernels.keep_freed_memory() and kernels.keep_freed_memory()
blocks = [torch.ones(4 * 2**20) for _ in range(40)]
before = resident(); del blocks; print(before - resident())
"""
    freed = {}
    for mode in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", code, mode], capture_output=True, text=True, cwd=Path.cwd())
        assert done.returncode == 0, done.stderr
        freed[mode] = float(done.stdout)
    assert freed["keep"] < 20 and freed["default"] > 600


def test_what_is_kept_can_be_returned_once():
    """Every second of 40 blocks of 16 MiB is freed, between others that are not."""
    code = """
import torch
from s3distill import kernels
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4 / 1024  # MiB
assert kernels.keep_freed_memory()
blocks = [torch.ones(4 * 2**20) for _ in range(40)]
del blocks[::2]
before = resident(); assert kernels.return_freed_memory(); returned = before - resident()
assert all(bool((block == 1).all()) for block in blocks)
before = resident(); del blocks; print(returned, before - resident())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    returned, later = map(float, done.stdout.split())
    assert returned > 300 and later < 20


def test_an_unrelated_apex_package_is_not_even_imported(tmp_path, monkeypatch, no_apex):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise AssertionError('the unrelated apex was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    model = _model_and_grads()
    assert type(kernels.fused_adamw(model.parameters())) is torch.optim.AdamW
    for row in kernels.report():
        assert not row.in_use
        assert row.implementation.startswith("torch")
    assert _row("layer_norm").why == "apex's compiled fused_layer_norm_cuda is not installed"


def test_compiled_kernels_beside_an_unrelated_apex_are_not_used(tmp_path, monkeypatch):
    _module(monkeypatch, "fused_layer_norm_cuda", forward_affine=None)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    row = _row("layer_norm")
    assert not row.in_use
    assert "apex.normalization" in row.why


def test_compiled_kernels_are_reported_in_use_only_with_a_gpu(monkeypatch):
    _module(monkeypatch, "amp_C", multi_tensor_adam=None, multi_tensor_l2norm=print)
    _module(monkeypatch, "apex")
    _module(monkeypatch, "apex.optimizers", FusedAdam=torch.optim.AdamW)
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert _row("adamw").in_use is available
        assert _row("clip_grad_norm").in_use is available
    assert "no CUDA device" in _row("adamw").why
    assert type(kernels.fused_adamw(_model_and_grads().parameters())) is torch.optim.AdamW  # these are CPU parameters
    assert _row("adamw").implementation == "torch AdamW, fused"


def test_a_kernel_that_does_not_load_says_why(tmp_path, monkeypatch, no_apex):
    monkeypatch.setattr(sys, "meta_path", [hook for hook in sys.meta_path if not isinstance(hook, _Hide)])
    (tmp_path / "amp_C.py").write_text("raise ImportError('undefined symbol: _ZN2at')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "does not load with torch" in _row("adamw").why
    assert "undefined symbol" in _row("adamw").why
    (tmp_path / "amp_C.py").write_text("")
    kernels._probe.cache_clear()
    sys.path_importer_cache.clear()
    for cached in (tmp_path / "__pycache__").glob("amp_C*"):
        cached.unlink()
    assert _row("adamw").why == "apex's compiled amp_C has no multi_tensor_adam"


@pytest.mark.gpu
@needs_gpu
def test_the_same_numbers_on_a_gpu():
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(4, 9, 64, device="cuda"),
        torch.randn(64, device="cuda"),
        torch.randn(64, device="cuda"),
    )
    torch.testing.assert_close(kernels.layer_norm(x, (64,), weight, bias), F.layer_norm(x, (64,), weight, bias))

    model, reference = _model_and_grads("cuda"), _model_and_grads("cuda")
    ours = kernels.fused_adamw(model.parameters(), lr=0.01, weight_decay=0.1)
    plain = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.1, foreach=False)
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    torch.testing.assert_close(kernels.clip_grad_norm(model.parameters(), 0.5), expected)
    for _ in range(3):
        ours.step()
        plain.step()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)
