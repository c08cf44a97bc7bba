"""How features learnt without labels are measured: each measure by hand, of the weights that are given."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pellucid.data import MultiView, View, eval_loader
from pellucid.errors import ConfigError
from pellucid.models import create_model
from pellucid.models.embed import patch_grid
from pellucid.training.objective import Held
from pellucid.training.representation import Representation, feature_width


def backbone(name="crate_digits", seed=0, **options):
    torch.manual_seed(seed)
    return create_model(name, **{"depth": 1, "num_classes": 0, "dynamic_img_size": True, **options})


def held(images, batch_size=64, large=2, labels=True, limit=150):
    view = View((8, 8), 1, images.mean, images.std, augment="small")
    plain = View((8, 8), 1, images.mean, images.std)

    def loaded(part, view):
        batches = list(eval_loader(part, view, batch_size, limit=limit))
        return batches if labels else [(x, torch.full_like(y, -1), i) for x, y, i in batches]

    many = MultiView(view, large=large, small=1, small_size=(4, 4))
    return Held(loaded(images.test, plain), loaded(images.train, plain), loaded(images.test, many))


def measured(objective, held, weights=None):
    return objective.evaluate(weights or objective.model.state_dict(), held)


@pytest.mark.parametrize("name", ["crate_digits", "vit_digits"])
def test_measures_by_hand(digits, name):
    objective = Representation(backbone(name, drop_rate=0.5)).train()
    given = held(digits.images)
    found = measured(objective, given)
    assert objective.model.training
    model = objective.model.eval()
    with torch.no_grad():
        pooled = [
            torch.cat([model.forward_head(model.forward_features(b[0]), pre_logits=True) for b in batches])
            for batches in (given.test, given.train)
        ]
        views = [torch.cat([model(b[0].large[:, v]) for b in given.views]) for v in range(2)]
    features, known = pooled
    unit = F.normalize(features, dim=-1)
    shares = torch.linalg.svdvals(unit.double())
    shares = shares / shares.sum() + 1e-7
    assert found["effective rank"] == pytest.approx((-shares * shares.log()).sum().exp().item(), rel=1e-3)
    cosines = unit @ unit.mT
    others = ~torch.eye(len(unit), dtype=torch.bool)
    assert found["cosine"] == pytest.approx(cosines[others].mean().item(), abs=1e-5)
    assert found["view cosine"] == pytest.approx(F.cosine_similarity(*views).mean().item(), abs=1e-5)
    lengths = features.norm(dim=-1)
    assert found["norm"] == pytest.approx(lengths.mean().item(), rel=1e-5)
    spread = lengths.var(correction=0).sqrt() / lengths.mean()
    assert found["norm spread"] == pytest.approx(spread.item(), abs=1e-4)
    labels, names = (torch.cat([b[1] for b in part]) for part in (given.test, given.train))
    near = (unit @ F.normalize(known, dim=-1).mT).topk(20, dim=-1)
    votes = torch.zeros(len(unit), 10).scatter_add_(1, names[near.indices], (near.values / 0.07).exp())
    right = (votes.argmax(-1) == labels).float().mean().item()
    assert found["knn accuracy"] == pytest.approx(right, abs=0.021)


def test_the_weights_that_are_given_are_measured_and_the_models_own_stay(digits):
    objective, other = Representation(backbone()), Representation(backbone(seed=1))
    given = held(digits.images)
    before = {key: value.clone() for key, value in objective.model.state_dict().items()}
    found = measured(objective, given, dict(other.model.state_dict()))
    assert found == pytest.approx(measured(other, given), rel=1e-5)
    assert found != measured(objective, given)
    after = objective.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_the_cut_into_batches_changes_no_measure(digits):
    objective = Representation(backbone())
    cut = measured(objective, held(digits.images, batch_size=33))
    assert cut == pytest.approx(measured(objective, held(digits.images, batch_size=150)), rel=1e-4)


def test_what_is_not_known_is_not_measured(digits):
    objective = Representation(backbone())
    assert "knn accuracy" not in measured(objective, held(digits.images, labels=False))
    assert "view cosine" not in measured(objective, held(digits.images, large=1))
    given = held(digits.images)
    assert "view cosine" not in measured(objective, Held(given.test, given.train))


def test_features_that_are_all_alike_or_not_finite_are_told(digits):
    objective = Representation(backbone())
    given = held(digits.images)
    weights = objective.model.state_dict()
    constant = {k: torch.zeros_like(v) if k == "norm.weight" else v for k, v in weights.items()}
    constant["norm.bias"] = torch.ones_like(weights["norm.bias"])
    found = measured(objective, given, constant)
    assert found["effective rank"] == pytest.approx(1, abs=1e-3)
    assert found["cosine"] == pytest.approx(1, abs=1e-5)
    history = [{**measured(objective, given), "step": 0}, {**found, "step": 1}]
    assert objective.verdict(history).state == "collapsed"
    broken = {**weights, "norm.bias": torch.full_like(weights["norm.bias"], math.inf)}
    found = measured(objective, given, broken)
    assert math.isnan(found["effective rank"])
    assert objective.verdict([history[0], found]).state == "collapsed"


def test_models_that_give_no_feature_are_refused():
    with pytest.raises(ConfigError, match="timm's forward_features, and Linear has none"):
        Representation(nn.Linear(3, 2))
    for name in ("crate_digits", "vit_digits"):
        with pytest.raises(
            ConfigError, match="an image needs one feature - give the model global_pool='avg'"
        ):
            Representation(backbone(name, global_pool=""))


@pytest.mark.parametrize("name", ["crate_digits", "tost_digits", "vit_digits"])
def test_sizes_of_a_model(name):
    model = backbone(name, img_size=(8, 12))
    assert patch_grid(model) == (4, 6)
    assert feature_width(model) == 64
