"""`prune_method` through the real model class, called in the order in which fairseq's trainer calls it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("fairseq")

from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf

import s3distill
from s3distill import compat
from s3distill.compat import starts
from s3distill.encoder.checkpoint import parse_checkpoint
from s3distill.masks.modules import Masked
from s3distill.masks.selection import num_removed
from s3distill.masks.state import network_of, read_masks
from s3distill.models.wav2vec_ctc_st import Wav2VecCtcSt, Wav2VecCtcStConfig
from tests.encoder import checkpoints

METHODS: dict[str, dict[str, Any]] = {
    "omp": {},
    "imp": {"prune_steps": 3, "prune_interval": 2},
    "parp": {"prune_interval": 2},
    "parp-p": {"prune_interval": 2, "prune_steps": 3},
}
TARGET = 0.25
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CTC fine-tuned file of stock fairseq: what ``w2v_path`` and ``finetune_from_model`` both name."""
    state, _ = checkpoints.fine_tuned("wav2vec2", seed=3, layer_norm_first=True)
    return checkpoints.save(state, tmp_path_factory.mktemp("dense") / "dense.pt")


class Task:
    target_dictionary = checkpoints.make_dictionary()


def make_config(method: str, w2v_path: Path, **options: Any) -> Any:
    """The whole configuration, as hydra composes it; the model's options are a part of it."""
    cfg = OmegaConf.structured(FairseqConfig())
    OmegaConf.set_struct(cfg, False)
    cfg.optimization.max_update = options.pop("max_update", 20)
    cfg.task = {"_name": "audio_ctc", "data": "", "normalize": False}
    values = {
        **{"w2v_path": str(w2v_path), "prune_method": method.removesuffix("-p"), "prune_rate": TARGET},
        **{"apply_mask": False, "no_prune_post_extract_proj": True, "_name": "wav2vec_ctc_st"},
        **METHODS.get(method, {}),
    }
    cfg.model = OmegaConf.merge(OmegaConf.structured(Wav2VecCtcStConfig), {**values, **options})
    return cfg


def build(method: str, dense: Path, **options: Any) -> tuple[Wav2VecCtcSt, Any]:
    torch.manual_seed(0)
    cfg = make_config(method, dense, **options)
    return Wav2VecCtcSt.build_model(cfg.model, Task()), cfg


def start(method: str, dense: Path, **options: Any) -> tuple[Wav2VecCtcSt, Any]:
    """A model that ``checkpoint.finetune_from_model`` was loaded into, as `Trainer.load_checkpoint` does it."""
    model, cfg = build(method, dense, **options)
    state = compat.load_checkpoint(dense)
    with mock.patch.object(starts, "_starting", True):
        model.set_num_updates(state["optimizer_history"][-1]["num_updates"])  # before the weights come
        model.load_state_dict(state["model"])
    return model, cfg


class Run:
    """What fairseq's trainer does with a model, in short; waveforms and targets depend on the update alone."""

    def __init__(self, model: Wav2VecCtcSt, num_updates: int = 0, lr: float = 0.01) -> None:
        self.model, self.num_updates = model, num_updates
        self.optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)

    def update(self, micro_batches: int = 2) -> None:
        for i in range(micro_batches):
            self.model.train()
            self.model.set_num_updates(self.num_updates)
            loss_of(self.model, 10 * self.num_updates + i).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_updates += 1

    def updates(self, until: int, evaluates: bool = False) -> Run:
        while self.num_updates < until:
            self.update()
            if evaluates:
                logits_of(self.model)
                self.model.state_dict()
        return self

    def checkpoint(self, cfg: Any) -> dict[str, Any]:
        """What the trainer writes, with the optimizer's state."""
        options = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
        return {
            "args": None,
            "cfg": options,
            "model": {name: value.clone() for name, value in self.model.state_dict().items()},
            "last_optimizer_state": self.optimizer.state_dict(),
            "optimizer_history": [{"num_updates": self.num_updates}],
            "task_state": {},
        }


def waveforms(seed: int, num: int = 2) -> Tensor:
    return torch.randn(num, 3200, generator=torch.Generator().manual_seed(seed))


def loss_of(model: Wav2VecCtcSt, seed: int) -> Tensor:
    out = model(waveforms(seed), torch.zeros(2, 3200, dtype=torch.bool))
    log_probs = model.get_normalized_probs(out, log_probs=True)
    targets = torch.tensor([[5, 6], [7, 5]])
    lengths = torch.full((2,), len(log_probs))
    return torch.nn.functional.ctc_loss(log_probs, targets, lengths, torch.tensor([2, 2]), zero_infinity=True)


@torch.no_grad()
def logits_of(model: Wav2VecCtcSt) -> Tensor:
    """[B, T, V], in evaluation."""
    model.eval()
    return model(waveforms(99), None)["encoder_out"].transpose(0, 1)


def masked(model: Wav2VecCtcSt) -> dict[str, Masked]:
    return model.w2v_encoder.masked_modules()


def removed_shares(model: Wav2VecCtcSt) -> Iterator[tuple[int, int]]:
    """Number of removed connections of each matrix as evaluated, and how many there are."""
    model.eval()
    for module in masked(model).values():
        mask = module.mask()
        yield int((~mask).sum()), mask.numel()


@each_method
def test_starts_from_the_loaded_weights(method: str, dense: Path) -> None:
    model, _ = start(method, dense)
    state = compat.load_checkpoint(dense)["model"]
    for name, parameter in model.named_parameters():
        if not name.endswith(".scores"):
            assert torch.equal(parameter, state[name]), f"{name} was changed before the first update"
    assert len(masked(model)) == 18 and not isinstance(model.w2v_encoder.proj, Masked)
    run = Run(model)
    run.update()
    for name, module in masked(model).items():
        weight = state[f"w2v_encoder.{name}.weight"]
        if method == "omp":
            threshold = weight.abs().flatten().sort().values[num_removed(TARGET, weight.numel())]
            assert torch.equal(module.mask(), weight.abs() >= threshold)
        assert not torch.equal(module.dense_weight(), weight), "all weights learn"
    assert not torch.equal(model.w2v_encoder.proj.weight, state["w2v_encoder.proj.weight"]), "and the head"


@each_method
def test_exact_counts_in_evaluation_whenever(method: str, dense: Path) -> None:
    model, _ = start(method, dense)
    run = Run(model)
    for update in range(6):
        assert all(removed == num_removed(TARGET, n) for removed, n in removed_shares(model)), update
        run.update()


@each_method
def test_checkpoints_hold_the_network_that_is_evaluated(method: str, dense: Path, tmp_path: Path) -> None:
    """Read, rebuilt, baked, loaded for inference and as `fairseq-generate` does: one network."""
    model, cfg = start(method, dense)
    run = Run(model).updates(3)  # in the midst of the steps of imp
    state = run.checkpoint(cfg)  # as saved in training
    evaluated = logits_of(model)
    parsed = parse_checkpoint(state)
    masks = read_masks(parsed)
    assert masks.keys() == masked(model).keys()
    for name, module in masked(model).items():
        assert torch.equal(masks[name], module.mask()), name
    torch.testing.assert_close(network_of(parsed)(waveforms(99))[0], evaluated, rtol=0, atol=0)
    torch.save(state, tmp_path / "run.pt")
    torch.testing.assert_close(s3distill.load(tmp_path / "run.pt")(waveforms(99)).logits, evaluated)

    decoder = Wav2VecCtcSt.build_model(OmegaConf.create(state["cfg"]).model, Task())
    decoder.set_num_updates(3)
    decoder.load_state_dict(state["model"])
    decoder.prepare_for_inference_(cfg)  # before eval() is called
    torch.testing.assert_close(logits_of(decoder), evaluated)
    assert not any(name.endswith(".scores") for name in decoder.state_dict())

    without = {**state, "model": {k: v for k, v in state["model"].items() if not k.endswith(".scores")}}
    difference = (network_of(parse_checkpoint(without))(waveforms(99))[0] - evaluated).abs().max()
    assert difference > 1e-3, "the weights alone are another network: the masks must show"


@pytest.fixture(scope="module")
def ends(dense: Path) -> dict[str, Wav2VecCtcSt]:
    """Each method after seven updates without a break and without evaluations."""
    return {method: Run(start(method, dense)[0]).updates(7).model for method in METHODS}


@each_method
@pytest.mark.parametrize("saved_at", [2, 3, 5])  # at an update that prunes, between two, behind the last step
def test_a_resumed_run_is_the_same_bit_for_bit(
    method: str, saved_at: int, dense: Path, ends: dict[str, Wav2VecCtcSt]
) -> None:
    first, cfg = start(method, dense)
    state = Run(first).updates(saved_at, evaluates=True).checkpoint(cfg)
    resumed, _ = build(method, dense)
    resumed.set_num_updates(saved_at)  # before the weights come, like fairseq's trainer
    resumed.load_state_dict(state["model"])
    run = Run(resumed, saved_at)
    run.optimizer.load_state_dict(state["last_optimizer_state"])
    end, again = ends[method].state_dict(), run.updates(7).model.state_dict()
    assert end.keys() == again.keys()
    for name, value in end.items():
        assert torch.equal(again[name], value), name
    begin = compat.load_checkpoint(dense)["model"]
    assert all(not torch.equal(value, begin[name]) for name, value in end.items() if name.endswith("fc1.weight"))


def test_methods_end_with_different_networks(ends: dict[str, Wav2VecCtcSt]) -> None:
    logits = {method: logits_of(model) for method, model in ends.items()}
    for one, other in itertools.combinations(logits, 2):
        assert (logits[one] - logits[other]).abs().max() > 1e-4, f"{one} and {other}"


def test_imp_keeps_what_it_removed_away_and_parp_lets_it_back(dense: Path) -> None:
    found = {}
    for method in ("imp", "parp"):
        model, _ = start(method, dense)
        run = Run(model, lr=0.1)  # so that a weight can grow from 0 to the threshold within an interval
        masks = []
        for update in (5, 7):  # imp has taken its last step
            run.updates(update)
            model.eval()
            masks.append({name: module.mask() for name, module in masked(model).items()})
            model.train()
        found[method] = sum(
            int((later[name] & ~earlier[name]).sum()) for earlier, later in itertools.pairwise(masks) for name in later
        )
    assert found["imp"] == 0 and found["parp"] > 0, found


def test_frozen_parts_stay(dense: Path) -> None:
    """``feature_grad_mult=0`` and ``freeze_finetune_updates`` mean what they mean in dense fine-tuning."""
    model, _ = start("omp", dense, feature_grad_mult=0.0, freeze_finetune_updates=2)
    state = compat.load_checkpoint(dense)["model"]
    run = Run(model).updates(2)
    changed = {
        name for name, value in model.state_dict().items() if name in state and not torch.equal(value, state[name])
    }
    assert changed == {"w2v_encoder.proj.weight", "w2v_encoder.proj.bias"}
    run.updates(3)
    changed = {
        name for name, value in model.state_dict().items() if name in state and not torch.equal(value, state[name])
    }
    assert "w2v_encoder.w2v_model.encoder.layers.0.fc1.weight" in changed
    assert not any("feature_extractor" in name for name in changed)


def test_s3_router_is_the_default_and_as_before(dense: Path) -> None:
    model, _ = start("s3_router", dense, init_score="weight_magnitude_with_scale")
    assert Wav2VecCtcStConfig.prune_method == "s3_router" and model.w2v_encoder.magnitude is None
    Run(model).updates(2)
    state = compat.load_checkpoint(dense)["model"]
    for name, value in model.state_dict().items():
        if name in state and not name.endswith("mask_emb"):
            assert torch.equal(value, state[name]), "weights stay"
    assert model.changed_weights() == {}


def test_a_start_with_masks_is_refused(dense: Path) -> None:
    other, _ = start("omp", dense)
    model, _ = build("parp", dense)
    with (
        mock.patch.object(starts, "_starting", True),
        pytest.raises(ValueError, match=r"prune_method=parp starts from a dense model, but .* was fine-tuned with"),
    ):
        model.load_state_dict(other.state_dict())
    model.load_state_dict(other.state_dict())  # a run that goes on has them


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("imp", {"max_update": 4}, r"final sparsity at update 4, but optimization\.max_update is 4"),
        ("omp", {"fix_mask": True}, "`fix_mask` is about learned scores"),
        ("omp", {"prune_rate": 1.0}, "nothing to prune"),
        ("omp", {"prune_interval": 10}, "`prune_interval` belongs to prune_method=imp and parp"),
    ],
)
def test_refused_before_training(method: str, options: dict[str, Any], message: str, dense: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build(method, dense, **options)
