"""Two drivers, one result."""

import contextlib
import json

import pytest
import torch

from pellucid.data import StepSampler, View, train_loader
from pellucid.models import create_model
from pellucid.training.learner import Learner
from pellucid.training.loops import fit_lightning, fit_plain
from pellucid.training.recipe import MuonAdamW
from pellucid.training.supervised import Supervised

VARIANTS = [
    {},
    {"accumulate": 4},
    {"average": 0.9},
    {"accumulate": 4, "average": 0.9, "clip": 0.5},
    {"precision": "bf16"},
]


@pytest.mark.parametrize(
    "options", VARIANTS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "as is"
)
def test_plain_loop_and_lightning_give_the_same_bits(digits, differences, options):
    options = {**options, "epochs": 1}
    plain = digits.reference(engine="plain", **options)
    assert differences(digits.reference(engine="lightning", **options), plain) == []


def test_options_that_must_matter_do(digits, differences):
    """Or the comparison above would compare a run with itself."""
    plain = digits.reference(engine="plain", epochs=1)
    for options in VARIANTS[1:]:
        assert differences(digits.reference(engine="plain", epochs=1, **options), plain) != [], options


def gradients_of_first_step(images, accumulate, driver, dtype=torch.float64):
    """The model's gradients as the update finds them, and the step's loss."""
    torch.manual_seed(0)
    objective = Supervised(create_model("crate_digits")).to(dtype)
    learner = Learner(objective, MuonAdamW(objective.model, 3e-3, 1e-2, 0.05), 10)
    view = View(img_size=(8, 8), in_chans=1, mean=images.mean, std=images.std, augment="small", seed=0)
    found = {}

    def update(apply=None):
        found.update({name: p.grad.clone() for name, p in objective.named_parameters()})
        learner.step += 1

    learner.update = update
    sampler = StepSampler(len(images.train), 128, seed=0, steps=1, accumulate=accumulate)
    batches = train_loader(images.train, view, sampler)
    assert len(batches) == accumulate
    parts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pellucid.data.loaders._as_fetched", lambda batch: (batch[0].to(dtype), *batch[1:]))
        if driver == "plain":
            fit_plain(learner, batches, parts.append, accumulate=accumulate)
        else:
            fit_lightning(learner, lambda rank, world: batches, parts.append, accumulate=accumulate)
    assert learner.step == 1
    return found, parts[0]["loss"]


@pytest.mark.parametrize("driver", ["plain", "lightning"])
def test_four_micro_batches_make_the_gradient_of_one_batch(digits, driver):
    whole, loss = gradients_of_first_step(digits.images, 1, driver)
    cut, cut_loss = gradients_of_first_step(digits.images, 4, driver)
    torch.testing.assert_close(cut, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(cut_loss, loss)


def test_accumulation_of_four_in_float32(digits):
    """The gradient, not the weights after many steps: Muon's bfloat16 iteration makes 1e-3 of a last bit."""
    whole, _ = gradients_of_first_step(digits.images, 1, "plain", torch.float32)
    cut, _ = gradients_of_first_step(digits.images, 4, "plain", torch.float32)
    for name in whole:
        assert (cut[name] - whole[name]).abs().max() <= 1e-5 * whole[name].abs().max().clamp(min=1e-2), name
    assert any(not torch.equal(cut[name], whole[name]) for name in whole)


def test_bf16_stays_near_float32(digits):
    def last_loss(run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if line["split"] == "test"][-1]

    full, half = last_loss(digits.reference()), last_loss(digits.reference(precision="bf16"))
    assert half != full
    assert half == pytest.approx(full, rel=0.03)
    start = torch.log(torch.tensor(10.0)).item()
    assert full < start - 0.2  # it has learnt: near means something


@contextlib.contextmanager
def swapped_parameters():
    """A move to "meta" keeps the identity of each parameter, as a move to a GPU does."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def test_state_follows_the_model_to_its_device(digits):
    torch.manual_seed(0)
    objective = Supervised(create_model("crate_digits"))
    learner = Learner(objective, MuonAdamW(objective.model, 3e-3, 1e-2, 0.05), 10, average=0.9)
    for p in objective.parameters():
        p.grad = torch.ones_like(p)
    learner.update()
    with swapped_parameters():
        objective.to("meta")
    learner.follow_model()
    devices = {
        name: value.device.type for name, value in learner.tensors().items() if not name.endswith("/step")
    }
    assert len(devices) > 3 * len(list(objective.parameters()))  # weights, their average, momenta
    assert set(devices.values()) == {"meta"}
