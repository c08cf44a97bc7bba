"""A loss or gradient that is not finite changes nothing, is saved around, and its images are named."""

import json

import pytest
import torch

from pellucid.errors import NumericsError
from pellucid.training.checkpoint import load_checkpoint
from pellucid.training.learner import Learner
from pellucid.training.supervised import Supervised

BAD_STEP = 8


def bad_gradient(value):
    def spoil(model, loss):
        parameter = dict(model.named_parameters())["layers.1.sparsify.dictionary"]

        def spoiled(gradient):
            gradient = gradient.clone()
            gradient[3, 5] = value
            handle.remove()
            return gradient

        handle = parameter.register_hook(spoiled)
        return loss

    return spoil


FAULTS = {
    "loss NaN": ("loss", lambda model, loss: loss * torch.nan),
    "loss +Inf": ("loss", lambda model, loss: loss * torch.inf),
    "loss -Inf, gradients finite": ("loss", lambda model, loss: loss - torch.inf),
    "loss NaN, gradients finite": ("loss", lambda model, loss: loss + torch.nan),
    "one gradient NaN": ("gradient", bad_gradient(torch.nan)),
    "one gradient Inf": ("gradient", bad_gradient(torch.inf)),
}


@pytest.fixture
def spoilt(monkeypatch):
    """Spoil one micro-batch of step BAD_STEP; returns what the update found and left, and the images."""

    def arm(spoil, bad_micro=0):
        seen: dict = {"images": []}
        forward, losses, update = Supervised.forward, Learner.losses, Learner.update

        def spoilt_forward(self, images, labels):
            parts = forward(self, images, labels)
            if self.training and seen.get("position") == (BAD_STEP - 1, bad_micro):
                parts["loss"] = spoil(self.model, parts["loss"])
            return parts

        def watched_losses(self, batch, micro):
            seen["position"] = (self.step, micro)
            if self.step == BAD_STEP - 1:
                seen["images"] += batch[2].tolist()
            return losses(self, batch, micro)

        def watched_update(self, apply=None):
            before = {name: value.clone() for name, value in self.tensors().items()}
            try:
                update(self, apply)
            except NumericsError:
                seen["before"], seen["after"] = before, self.tensors()
                seen["step"] = self.step
                seen["gradients"] = [p.grad for p in self.objective.parameters()]
                raise

        monkeypatch.setattr(Supervised, "forward", spoilt_forward)
        monkeypatch.setattr(Learner, "losses", watched_losses)
        monkeypatch.setattr(Learner, "update", watched_update)
        return seen

    return arm


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("engine", ["plain", "lightning"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_step_is_not_taken(digits, tmp_path, spoilt, fault, engine):
    what, spoil = FAULTS[fault]
    seen = spoilt(spoil)
    run = tmp_path / "run"
    with pytest.raises(NumericsError) as error:
        digits.train(run, engine=engine, average=0.9, clip=1.0, max_skipped=0)
    # Weights, momenta, average and step are as before, and so is what is saved.
    assert seen["step"] == BAD_STEP - 1
    assert_same(seen["after"], seen["before"])
    assert any(name.startswith("average/") for name in seen["before"])
    assert any(name.startswith("optimizer/") for name in seen["before"])
    assert seen["gradients"] == [None] * len(seen["gradients"])
    saved = load_checkpoint(run / "checkpoints")
    assert saved.step == BAD_STEP - 1
    assert_same(saved.tensors, seen["before"])
    # The images of the batch, and no others, are listed.
    bad = json.loads((run / "bad" / f"step-{BAD_STEP:08d}.json").read_text())
    assert [item["index"] for item in bad["items"]] == seen["images"]
    assert len(bad["items"]) == 128
    assert bad["items"][0] == {"index": seen["images"][0], "epoch": 0, "name": f"digits[{seen['images'][0]}]"}
    message = str(error.value)
    assert message.startswith(f"non-finite {what} at step {BAD_STEP}: the step was not applied")
    assert f"the state after step {BAD_STEP - 1} is saved" in message
    assert str(run / "bad" / f"step-{BAD_STEP:08d}.json") in message
    assert "--lr" in message
    assert message.count("\n") < 5


@pytest.mark.parametrize("micro", [0, 2])
def test_one_micro_batch_of_an_accumulated_step(digits, tmp_path, spoilt, differences, monkeypatch, micro):
    options = {"accumulate": 4, "average": 0.9, "engine": "plain", "max_skipped": 0}
    run = tmp_path / "run"
    seen = spoilt(FAULTS["loss NaN, gradients finite"][1], bad_micro=micro)
    with pytest.raises(NumericsError, match=f"non-finite loss at step {BAD_STEP}"):
        digits.train(run, **options)
    assert_same(seen["after"], seen["before"])
    bad = json.loads((run / "bad" / f"step-{BAD_STEP:08d}.json").read_text())
    assert [item["index"] for item in bad["items"]] == seen["images"]
    assert len(seen["images"]) == 128
    monkeypatch.undo()
    digits.train(run, resume=True, **options)
    assert differences(run, digits.reference(**options)) == []


def test_a_batch_over_the_end_of_an_epoch_is_listed_with_both(digits, tmp_path, spoilt, monkeypatch):
    monkeypatch.setattr(f"{__name__}.BAD_STEP", 11)
    seen = spoilt(FAULTS["loss NaN"][1])
    with pytest.raises(NumericsError):
        digits.train(tmp_path / "run", max_skipped=0)
    items = json.loads((tmp_path / "run" / "bad" / "step-00000011.json").read_text())["items"]
    assert [item["index"] for item in items] == seen["images"]
    left = len(digits.images.train) % 128
    assert [item["epoch"] for item in items] == [0] * left + [1] * (128 - left)


def test_through_the_command_line(tmp_path, spoilt, train_command, capsys):
    spoilt(FAULTS["loss NaN"][1])
    assert train_command(tmp_path / "run", "--max-skipped", "0") == 5
    error = capsys.readouterr().err
    assert error.startswith(f"error: non-finite loss at step {BAD_STEP}: ")
    assert error.count("\n") <= 5


def test_a_step_taken_regardless_would_be_seen(digits, tmp_path, spoilt, monkeypatch):
    """With the check gone the run goes on, and its weights are lost."""
    spoilt(FAULTS["loss NaN"][1])
    monkeypatch.setattr(
        "pellucid.training.learner.torch.Tensor.isfinite", lambda self: torch.ones_like(self).bool()
    )
    digits.train(tmp_path / "run", epochs=1)
    weights = load_checkpoint(tmp_path / "run" / "checkpoints").tensors
    assert torch.isnan(weights["objective/model.head.weight"]).any()


def test_an_update_that_overflows_is_not_saved(digits, tmp_path, between_steps, monkeypatch):
    """Finite gradients, infinite weights: the next save refuses, and the last good one is named."""
    run = tmp_path / "run"
    update = Learner.update

    def overflows(self, apply=None):
        update(self, apply)
        if self.step == BAD_STEP:
            with torch.no_grad():
                self.model.head.weight[0, 0] = torch.inf

    monkeypatch.setattr(Learner, "update", overflows)
    with pytest.raises(NumericsError) as error:
        digits.train(run, save_every=BAD_STEP - 3)
    assert "non-finite tensors (objective/model.head.weight" in str(error.value)
    assert f"last good checkpoint: step-{BAD_STEP - 3:08d}" in str(error.value)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{BAD_STEP - 3:08d}"]
