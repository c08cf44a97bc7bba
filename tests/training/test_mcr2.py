"""Rate reduction as a training objective: its known optimum, its classifier, and whole runs."""

import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import pellucid
from pellucid.data import Crops, View, eval_loader
from pellucid.errors import ConfigError
from pellucid.models import create_model
from pellucid.models.embed import image_size
from pellucid.objectives import class_coding_rate, coding_rate, rate_reduction
from pellucid.training.mcr2 import MCR2, SelfSupervisedMCR2, unit_features

# --- the objective has an optimum that is known -----------------------------------------------------------


def optimal_singular_value(size, n, d, eps, weight):
    """Of every class's features at a maximum of rate reduction - weight/2 ||Z||^2 (Wang et al. 2024)."""
    a, own = d / (n * eps**2), d / (size * eps**2)
    h = own - a - weight * (n / size + 1)
    return math.sqrt((h + math.sqrt(h**2 - 4 * weight**2 * n / size)) / (2 * weight * own))


@pytest.mark.parametrize("sizes", [(20, 20, 20), (10, 20, 30)])
@pytest.mark.parametrize("eps", [0.3, 0.5])
def test_an_optimiser_reaches_the_optimum_of_the_regularised_objective(sizes, eps):
    n, d = sum(sizes), 9
    largest = n / max(sizes)
    most = d * (largest**0.5 - 1) / (n * (largest**0.5 + 1) * eps**2)
    weight = 0.1 * most
    labels = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [z],
        lr=1,
        max_iter=3000,
        history_size=50,
        tolerance_grad=1e-10,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = weight / 2 * z.square().sum() - rate_reduction(z, labels, eps)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert z.grad.abs().max() < 1e-6
    parts = z.detach().split(sizes)
    ranks = []
    for part, size in zip(parts, sizes, strict=True):
        found, expected = torch.linalg.svdvals(part), optimal_singular_value(size, n, d, eps, weight)
        ranks.append(int((found > 1e-3 * expected).sum()))
        torch.testing.assert_close(
            found[: ranks[-1]], torch.full((ranks[-1],), expected).double(), rtol=1e-5, atol=0
        )
    assert sum(ranks) == d  # the classes share all dimensions among them
    for i, part in enumerate(parts):
        for other in parts[:i]:
            assert (part @ other.T).abs().max() < 1e-4 * part.norm() * other.norm()


# --- one batch --------------------------------------------------------------------------------------------


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 1, 8, 8, generator=generator), torch.arange(40) % 10


def small(name="crate_digits", **options):
    torch.manual_seed(0)
    return create_model(name, **{"num_classes": 10, "depth": 1, **options})


def test_the_loss_is_the_rates_of_unit_features(batch):
    images, labels = batch
    model = small()
    parts = MCR2(model, eps=0.7)(images, labels)
    tokens = model.forward_head(model.forward_features(images), pre_logits=True)
    z = tokens / tokens.norm(dim=-1, keepdim=True)
    assert parts["rate"] == pytest.approx(coding_rate(z, 0.7).item(), rel=1e-5)
    assert parts["class rate"] == pytest.approx(class_coding_rate(z, labels, 0.7).item(), rel=1e-5)
    assert parts["loss"].item() == pytest.approx((parts["class rate"] - parts["rate"]).item(), rel=1e-5)
    parts["loss"].backward()
    head = model.get_classifier()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (parameter is head.weight or parameter is head.bias), name


def test_images_of_unknown_class_take_part_in_the_whole_only(batch):
    images, labels = batch
    hidden = labels.where(torch.arange(40) < 30, -1)
    all_parts, parts = MCR2(small())(images, labels), MCR2(small())(images, hidden)
    known = MCR2(small())(images[:30], labels[:30])
    assert parts["rate"] == all_parts["rate"]
    assert parts["class rate"].item() == pytest.approx(known["class rate"].item(), rel=1e-6)
    nobody = MCR2(small())(images, torch.full((40,), -1))
    assert nobody["class rate"] == nobody["accuracy"] == 0
    assert nobody["loss"] == -nobody["rate"]


def test_the_classifier_has_the_least_squared_error_on_what_was_seen(batch):
    """On one batch seen again and again; ridge regression as an ordinary one with d rows more."""
    images, labels = batch
    objective = MCR2(small(), eps=0.5)
    for _ in range(3):
        objective(images, labels)
    z = unit_features(objective.model, images).detach()
    dim = z.shape[1]
    ridge = math.sqrt(len(z) * 0.5**2 / dim) * torch.eye(dim)
    targets = torch.cat([F.one_hot(labels, 10).float(), torch.zeros(dim, 10)])
    expected = torch.linalg.lstsq(torch.cat([z, ridge]).double(), targets.double()).solution.mT
    head = objective.model.get_classifier()
    torch.testing.assert_close(head.weight.double(), expected, rtol=1e-3, atol=1e-4)
    assert not head.bias.any()
    objective.eval()
    parts = objective(images, labels)
    guessed = objective.model.eval()(images).argmax(-1)
    assert parts["accuracy"] == (guessed == labels).float().mean()
    before = objective.moments.clone()
    objective(images, labels)
    assert torch.equal(objective.moments, before)  # evaluation leaves no trace


def test_subspace_accuracy_is_that_of_the_nearest_subspace(batch):
    from pellucid.analytic import NearestSubspace

    images, labels = batch
    objective = MCR2(small())
    objective(images, labels)
    found = objective.eval()(images, labels)["subspace accuracy"]
    z = unit_features(objective.model, images).detach().double()
    expected = NearestSubspace(z.shape[1] // 10).fit(z, labels).score(z, labels)
    assert found == pytest.approx(expected)
    assert len(set(objective._bases()[0].shape)) == 2


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_any_backbone_of_timms(name):
    model = timm.create_model(name, num_classes=3, **({"depth": 1, "img_size": 32} if "vit" in name else {}))
    objective = MCR2(model)
    parts = objective(torch.randn(6, 3, 32, 32), torch.arange(6) % 3)
    parts["loss"].backward()
    assert all(value.isfinite() for value in parts.values())
    assert model.get_classifier().weight.grad is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 2), "timm's forward_features, and Linear has none"),
        (lambda: small(num_classes=0), "classifier is one linear map, and CRATE has a Identity"),
    ],
)
def test_refuses_models(model, message):
    with pytest.raises(ConfigError, match=message):
        MCR2(model if isinstance(model, nn.Module) else model())


def test_refuses_distortions():
    with pytest.raises(ConfigError, match=r"eps is 0\.0"):
        MCR2(small(), eps=0.0)
    with pytest.raises(ConfigError, match=r"weight 0 must be larger"):
        SelfSupervisedMCR2(small(), weight=0)


@pytest.mark.parametrize("kind", [MCR2, SelfSupervisedMCR2])
def test_features_that_are_not_finite_make_a_loss_that_is_not(batch, kind):
    images, labels = batch
    images[3, 0, 2, 2] = math.nan
    objective = kind(small())
    parts = objective(images if kind is MCR2 else several(images.unflatten(0, (8, 5))), labels)
    assert parts["loss"].isnan()
    parts["loss"].backward()
    assert all(value.isfinite().all() for value in objective.state_dict().values())


# --- whole runs -------------------------------------------------------------------------------------------


def test_a_run_hands_over_a_classifier(digits, tmp_path):
    out = digits.train(tmp_path / "run", objective="mcr2", augment="none", epochs=6)
    run = pellucid.training.open_run(out)
    assert run.config.objective == "mcr2"
    assert run.accuracy > 0.6
    last = run.metrics[-1]
    assert last["subspace accuracy"] > 0.6
    losses = [line["loss"] for line in run.metrics if line["split"] == "train"]
    assert losses[-1] < losses[0] < 0
    images = digits.images
    view = View(image_size(run.model), images.in_chans, images.mean, images.std)
    scores = pellucid.evaluate(pellucid.load(out), eval_loader(images.test, view))
    assert scores.accuracy == pytest.approx(run.accuracy, abs=1e-6)


def test_a_stopped_run_goes_on_to_the_same_bits(digits, differences, tmp_path):
    options = {"objective": "mcr2", "epochs": 1}
    whole = digits.train(tmp_path / "whole", **options)
    digits.stopped(tmp_path / "parts", after=5, **options)
    digits.train(tmp_path / "parts", resume=True, **options)
    assert differences(whole, tmp_path / "parts") == []


# --- without labels ---------------------------------------------------------------------------------------


def several(views):
    """Views (b, v, c, h, w) as a batch of large crops."""
    return Crops(views, views[:, :0], torch.zeros(len(views), views.shape[1], 0, dtype=torch.bool))


def test_the_self_supervised_loss_takes_images_for_classes(batch):
    images, _ = batch
    model = small()
    parts = SelfSupervisedMCR2(model, eps=0.5, gain=4.0, weight=0.3)(several(images.unflatten(0, (8, 5))))
    z = unit_features(model, images)
    owner = torch.arange(8).repeat_interleave(5)
    expected = class_coding_rate(z, owner, 0.5) - 0.3 * coding_rate(z, 0.25)
    assert parts["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_labels_views_of_an_image_gather(digits):
    images = digits.images
    view = View((8, 8), 1, images.mean, images.std, augment="small")
    pictures = images.train.images[:64]

    def views(step):
        drawn = [view.batch(pictures, torch.arange(64), epoch=8 * step + v) for v in range(8)]
        return torch.stack(drawn, 1)

    def gathered(model):
        """How much closer to each other are views of one image than those of several, in cosines."""
        with torch.no_grad():
            z = unit_features(model, views(1000).flatten(0, 1)).unflatten(0, (64, 8))
        own = (z @ z.mT).mean()
        return (own - (z[:, 0] @ z[:, 1].mT).mean()).item()

    model = small()
    before = gathered(model)
    objective = SelfSupervisedMCR2(model, eps=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        loss = objective(several(views(step)))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert gathered(model) > before + 0.1
