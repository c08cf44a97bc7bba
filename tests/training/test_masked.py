"""Masked autoencoding: the loss by hand, the masks, the run."""

import pytest
import torch
from torch.nn import functional as F

from pellucid.data import Crops, MaskedView, StepSampler, View, eval_loader, train_loader
from pellucid.errors import ConfigError
from pellucid.measure.reconstruction import reconstructions
from pellucid.models import CRATEMAE, create_model, load
from pellucid.objectives import masked_error
from pellucid.training import TrainConfig, open_run
from pellucid.training.learner import Learner
from pellucid.training.loops import fit_lightning, fit_plain
from pellucid.training.masked import MAE
from pellucid.training.objective import Held
from pellucid.training.recipe import MuonAdamW

RUN = {"objective": "mae", "model": "crate_mae_digits", "model_args": {"depth": 2}}


def objective_of(name="crate_mae_digits", ratio=0.75, **model_args):
    torch.manual_seed(0)
    return MAE(create_model(name, num_classes=0, **model_args), mask_ratio=ratio)


def view_of(images, augment="small"):
    return View((8, 8), 1, images.mean, images.std, augment=augment)


def first_batch(images, objective, size=16):
    sampler = StepSampler(len(images.train), size, seed=0, steps=1)
    return next(iter(train_loader(images.train, MaskedView(view_of(images), objective.masking), sampler)))


@pytest.mark.parametrize("name", ["crate_mae_digits", "vit_mae_digits"])
def test_the_loss_is_the_mean_of_the_images_masked_errors(digits, name):
    objective = objective_of(name)
    crops, labels, _ = first_batch(digits.images, objective)
    images, mask = crops.large[:, 0], crops.mask[:, 0]
    guess = objective.model.reconstruct(images, mask)
    target = F.unfold(images, 2, stride=2).mT  # of one channel: row by row, as patches are
    expected = masked_error(guess, target, mask).mean()
    torch.testing.assert_close(objective(crops, labels)["loss"], expected)


def test_hidden_pixels_have_no_part_in_the_guess_and_shown_ones_none_in_the_target(digits):
    objective = objective_of()
    crops, labels, _ = first_batch(digits.images, objective)
    of_patch = crops.mask[:, 0].unflatten(-1, (4, 4)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    zero = crops._replace(large=crops.large.masked_fill(of_patch[:, None, None], 0.0))
    one = crops._replace(large=crops.large.masked_fill(of_patch[:, None, None], 1.0))
    model, mask = objective.model, crops.mask[:, 0]
    guess = model.reconstruct(zero.large[:, 0], mask)
    assert torch.equal(guess, model.reconstruct(one.large[:, 0], mask))
    for other, level in ((zero, 0.0), (one, 1.0)):
        by_hand = (guess - level).square().mean(-1)[mask].mean()
        torch.testing.assert_close(objective(other, labels)["loss"], by_hand)


@pytest.mark.parametrize(("ratio", "hidden"), [(0.75, 12), (0.5, 8), (0.6, 10), (0.9, 15)])
def test_every_image_hides_the_stated_share(digits, ratio, hidden):
    crops = first_batch(digits.images, objective_of(ratio=ratio))[0]
    assert crops.mask.sum(-1).flatten().tolist() == [hidden] * 16
    assert CRATEMAE.random_mask(objective_of().model, 1, ratio).sum() == hidden


@pytest.mark.parametrize(("side", "ratio"), [(4, 0.5), (8, 0.5), (10, 17 / 25), (12, 0.75), (28, 0.75)])
def test_a_run_hides_three_quarters_and_leaves_eight_patches_where_it_can(side, ratio):
    config = TrainConfig(data="digits")
    found = MAE.build(create_model("crate_mae_digits", num_classes=0, img_size=side), config, 10)
    assert found.settings == {"mask_ratio": pytest.approx(ratio)}
    config = TrainConfig(data="digits", objective_args={"mask_ratio": 0.6})
    assert MAE.build(found.model, config, 10).mask_ratio == 0.6


def gradients_of_first_step(images, accumulate, driver):
    """In float64: the model's gradients as the update finds them, and the step's loss."""
    objective = objective_of().double()
    learner = Learner(objective, MuonAdamW(objective.model, 3e-3, 1e-2, 0.05), 10)
    found, parts = {}, []

    def update(apply=None):
        found.update({name: p.grad.clone() for name, p in objective.named_parameters()})
        learner.step += 1

    learner.update = update
    sampler = StepSampler(len(images.train), 64, seed=0, steps=1, accumulate=accumulate)
    batches = train_loader(images.train, MaskedView(view_of(images), objective.masking), sampler)

    def in_float64(batch):
        return batch[0]._replace(large=batch[0].large.double()), *batch[1:]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pellucid.data.loaders._as_fetched", in_float64)
        if driver == "plain":
            fit_plain(learner, batches, parts.append, accumulate=accumulate)
        else:
            fit_lightning(learner, lambda rank, world: batches, parts.append, accumulate=accumulate)
    assert learner.step == 1
    return found, parts[0]["loss"]


@pytest.mark.parametrize("driver", ["plain", "lightning"])
def test_no_cut_of_the_batch_changes_loss_or_gradient(digits, driver):
    whole, loss = gradients_of_first_step(digits.images, 1, driver)
    cut, cut_loss = gradients_of_first_step(digits.images, 4, driver)
    torch.testing.assert_close(cut_loss, loss, rtol=1e-6, atol=0)  # logged in float32
    assert whole.keys() == cut.keys()
    for name, gradient in whole.items():
        assert gradient.any(), name
        torch.testing.assert_close(cut[name], gradient, rtol=1e-9, atol=1e-14)


def evaluated(images, objective, batch_size=256, weights=None):
    view = view_of(images, "none")
    train, test = (eval_loader(part, view, batch_size, limit=100) for part in (images.train, images.test))
    return objective.evaluate(weights or objective.handed_over(), Held(test, train))


def test_measures_of_a_model_are_the_same_every_time(digits):
    objective = objective_of().train()
    measures = evaluated(digits.images, objective)
    torch.manual_seed(5)
    assert evaluated(digits.images, objective) == measures
    assert objective.training
    assert measures.keys() >= {"loss", "effective rank", "cosine", "knn accuracy"}
    for other in (evaluated(digits.images, objective, batch_size=33),):
        assert other == pytest.approx(measures, rel=1e-5)
    assert evaluated(digits.images, objective_of(ratio=0.5))["loss"] != measures["loss"]


def test_the_weights_that_are_given_are_those_that_are_measured(digits):
    objective, other = objective_of(), objective_of(sparsity=0.5)
    torch.nn.init.constant_(other.model.decoder_head.bias, 3.0)
    mine, theirs = evaluated(digits.images, objective), evaluated(digits.images, other)
    assert theirs["loss"] > mine["loss"] + 1
    weights = other.handed_over()
    assert evaluated(digits.images, objective, weights=weights)["loss"] == pytest.approx(
        theirs["loss"], rel=0.05
    )


def test_the_test_loss_is_that_of_masks_that_hide_the_stated_share(digits):
    objective = objective_of()
    view = view_of(digits.images, "none")
    batches = list(eval_loader(digits.images.test, view, 64, limit=100))
    crops = [c for c, _ in objective._masked(batches)]
    assert all(isinstance(c, Crops) for c in crops)
    assert torch.cat([c.mask for c in crops]).sum(-1).flatten().tolist() == [12] * 100
    with torch.no_grad():
        errors = torch.cat([objective.model.masked_loss(c.large[:, 0], c.mask[:, 0]) for c in crops])
    assert evaluated(digits.images, objective)["loss"] == pytest.approx(errors.mean().item(), rel=1e-5)


@pytest.mark.parametrize(("options", "message"), [
    ({"model": "crate_digits"}, "needs a model with a decoder, and CRATE has none .* crate_mae_digits"),
    ({"model": "vit_digits"}, "VisionTransformer has none"),
    ({"objective_args": {"mask_ratio": 1.0}}, r"mask_ratio: a mask ratio of 1.0 leaves 0 of 16 patches"),
    ({"objective_args": {"mask_ratio": 0.0}}, "leaves 16 of 16"),
    ({"objective_args": {"mask_rato": 0.5}}, "did you mean 'mask_ratio'"),
    ({"objective_args": {"mask_ratio": "much"}}, "mask_ratio is 'much'; expected float"),
    ({"model_args": {"reg_tokens": 4}}, "no use for registers"),
])  # fmt: skip
def test_what_cannot_be(digits, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        digits.train(tmp_path / "run", **{**RUN, **options})
    assert not (tmp_path / "run").exists()


def test_a_run_learns_and_leaves_a_model_that_reconstructs(digits, tmp_path):
    out = digits.train(tmp_path / "run", **{**RUN, "model": "", "model_args": {}}, epochs=4)
    run = open_run(out)
    assert run.config.model == "crate_mae_digits"
    assert run.config.augment == "none"
    assert run.config.objective_args == {"mask_ratio": 0.5}
    assert run.accuracy is None
    assert run.model.num_classes == 0
    assert run.measures["loss"] < 0.7 * evaluated(digits.images, objective_of())["loss"]
    assert run.measures["knn accuracy"] > 0.3
    losses = [line["loss"] for line in run.metrics if line["split"] == "train"]
    assert losses[-1] < 0.8 * losses[0]

    model = load(out)
    test = next(iter(eval_loader(digits.images.test, view_of(digits.images, "none"), 32)))[0]
    mask = model.random_mask(32)
    _, masked, filled = reconstructions(model, test, mask)
    assert 0 < (filled - test).square().mean() < 0.7 * (masked - test).square().mean()


VARIANTS = {
    "as is": {},
    "averaged": {"average": 0.9, "accumulate": 4, "engine": "plain"},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=pytest.mark.slow) if k == "bf16" else k for k in VARIANTS]
)
def test_stopped_and_resumed_it_ends_in_the_same_bits(digits, tmp_path, differences, name):
    options = {**RUN, "epochs": 1.5, **VARIANTS[name]}
    digits.stopped(tmp_path / "run", 4, **options)
    digits.stopped(tmp_path / "run", 13, resume=True, **options)
    digits.train(tmp_path / "run", resume=True, **options)
    assert differences(tmp_path / "run", digits.reference(**options)) == []


def test_engines_agree_to_the_bit(digits, differences):
    lightning, plain = (digits.reference(**RUN, epochs=1, engine=engine) for engine in ("lightning", "plain"))
    assert differences(lightning, plain) == []


def test_masks_that_came_from_the_global_random_state_would_be_seen(
    digits, tmp_path, differences, monkeypatch
):
    """Or the comparisons above would compare runs that hide the same patches whatever happens."""
    options = {**RUN, "epochs": 1}
    reference = digits.reference(**options)

    def anywhere(self, uniform):
        shape = (*uniform.shape[:-1], uniform.shape[-1] - 2)
        return torch.rand(shape).argsort(-1).argsort(-1) < 12

    monkeypatch.setattr("pellucid.data.Masking.mask", anywhere)
    digits.train(tmp_path / "run", **options)
    found = differences(tmp_path / "run", reference)
    assert "model decoder_head.weight" in found
