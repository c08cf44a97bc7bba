"""What is said of one input in one layer, held to the formulas written out."""

import math

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from pellucid.errors import ConfigError
from pellucid.measure import audit
from pellucid.measure.firing import strongest
from pellucid.measure.inside import follow, look_into, steps_of
from pellucid.models import create_model

WHITE = ["crate_digits", "crate_strict_digits", "crate_alpha_digits", "tost_digits"]


def built(name: str, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, **options) if name == "vit_timm" else create_model(name, **options)
    return model.eval()


def picture(seed: int = 1) -> torch.Tensor:
    return torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def tokens_of(model, images: torch.Tensor) -> list[torch.Tensor]:
    """Tokens after every step, by hand."""
    kept: list[torch.Tensor] = []
    with torch.no_grad():
        model.forward_features(images, on_step=lambda r: kept.append(r.z_next[0]))
    return kept


@pytest.mark.parametrize("name", WHITE)
def test_the_way_of_the_tokens(name):
    model, images = built(name), picture()
    path = follow(model, images)
    states = [model.embed(images)[0].detach(), *tokens_of(model, images)]
    assert path.points[0] == (0, "embedding")
    assert [p[1] for p in path.points[1:3]] == ["compress", "sparsify"]
    assert len(path.points) == len(states) == 2 * len(model.layers) + 1
    for p, z in enumerate(states):
        torch.testing.assert_close(path.norms[p], z.norm(dim=-1), rtol=1e-4, atol=1e-5)
    moved = (states[1] - states[0]).norm(dim=-1) / states[0].norm(dim=-1)
    torch.testing.assert_close(path.moved[1], moved, rtol=1e-3, atol=1e-4)
    turned = F.cosine_similarity(states[1], states[0], dim=-1)
    torch.testing.assert_close(path.turned[1], turned, rtol=1e-3, atol=1e-4)
    assert bool((path.turned[0] == 1).all())
    assert 0 < path.shares[1] <= path.shares[0] <= 1


def test_places_are_the_principal_components():
    model, images = built("crate_digits"), picture()
    path = follow(model, images)
    states = torch.stack([model.embed(images)[0].detach(), *tokens_of(model, images)])
    rows = F.normalize(states, dim=-1).flatten(0, 1).double().numpy()
    rows = rows - rows.mean(0)
    _, values, axes = np.linalg.svd(rows, full_matrices=False)
    expected = rows @ axes[:2].T
    found = path.places.flatten(0, 1).numpy()
    for k in range(2):
        sign = np.sign(expected[:, k] @ found[:, k])
        np.testing.assert_allclose(found[:, k], sign * expected[:, k], atol=1e-4)
        assert path.shares[k] == pytest.approx(values[k] ** 2 / (values**2).sum(), rel=1e-4)


@pytest.mark.parametrize("name", [*WHITE, "vit_digits"])
def test_of_one_image_the_path_says_what_the_audit_says(name):
    model, images = built(name), picture()
    rows, found = audit(model, [images]).rows, follow(model, images).steps
    assert len(rows) == len(found)
    for row, step in zip(rows, found, strict=True):
        for key in ("layer", "step", "objective"):
            assert row[key] == step[key]
        for key in ("before", "after", "coding_rate", "nonzero", "rank"):
            assert step[key] == (None if row[key] is None else pytest.approx(row[key], rel=1e-4)), key


def test_attention_is_the_softmax_of_projections():
    model, images = built("crate_digits"), picture()
    records = []
    with torch.no_grad():
        model.forward_features(images, on_step=records.append)
    seen = look_into(model, images, 2)
    record = records[2]
    step = record.step
    w = step.project(record.z)[0].detach().double().numpy()
    for head in range(step.num_heads):
        logits = w[head] @ w[head].T / math.sqrt(step.head_dim)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(seen.attention[head].numpy(), weights, atol=1e-5)
    torch.testing.assert_close(seen.projection, step.project(record.z)[0].detach())
    torch.testing.assert_close(seen.after, records[3].z_next[0])
    torch.testing.assert_close(seen.code, records[3].z_next[0])


def test_energy_is_what_lies_in_a_subspace():
    model, images = built("crate_digits"), picture()
    step, records = model.layers[0]["compress"], []
    with torch.no_grad():
        model.forward_features(images, on_step=records.append)
    seen = look_into(model, images, 1)
    z = step.norm(records[0].z)[0].detach().double().numpy()
    for head, basis in enumerate(step.U.detach().double().numpy()):
        q, _ = np.linalg.qr(basis)
        share = ((z @ q) ** 2).sum(-1) / (z**2).sum(-1)
        np.testing.assert_allclose(seen.energy[head].numpy(), share, atol=1e-5)


@pytest.mark.parametrize("name", ["tost_digits", "crate_strict_digits", "vit_digits"])
def test_what_a_layer_does_not_have_is_none(name):
    seen = look_into(built(name), picture(), 1)
    assert (seen.membership is not None) == (name == "tost_digits")
    assert (seen.attention is not None) == (name == "vit_digits")
    assert (seen.projection is None) == (name == "vit_digits")
    if seen.membership is not None:
        torch.testing.assert_close(seen.membership.sum(0), torch.ones(seen.membership.shape[1]))
    if seen.attention is not None:
        torch.testing.assert_close(seen.attention.sum(-1), torch.ones(seen.attention.shape[:2]))


def test_weights_in_words():
    model = built("crate_digits")
    first, second = steps_of(model)[:2]
    assert (first["layer"], first["step"], first["kind"]) == (1, "compress", "MSSA")
    assert first["objective"] == "R^c(Z | U)"
    U = model.layers[0]["compress"].U.detach().double()
    bases = torch.linalg.qr(U).Q
    assert first["overlap"].shape == (8, 8)
    expected = torch.linalg.svdvals(bases[1].mT @ bases[4]).max().item()
    assert first["overlap"][1, 4].item() == pytest.approx(expected, abs=1e-5)
    assert first["overlap"].diagonal().tolist() == pytest.approx([1.0] * 8, abs=1e-5)
    atoms = second["atoms"]
    assert sum(second["cosines"]) == atoms * (atoms - 1) // 2
    D = model.layers[0]["sparsify"].dictionary.detach()
    torch.testing.assert_close(second["singular_values"], torch.linalg.svdvals(D), rtol=1e-4, atol=1e-4)


def test_a_timm_vit_has_steps_too():
    found = steps_of(built("vit_digits"))
    assert [step["step"] for step in found[:2]] == ["attention", "mlp"]
    assert found[0]["objective"] is None
    assert found[0]["heads"] == 4
    assert found[1]["atoms"] == 256


def test_what_cannot_be_looked_at_is_refused():
    model = built("crate_digits")
    with pytest.raises(ConfigError, match="one at a time"):
        follow(model, torch.zeros(2, 1, 8, 8))
    with pytest.raises(ConfigError, match="no layer 9"):
        look_into(model, picture(), 9)
    with pytest.raises(ConfigError, match="cannot look inside ResNet"):
        steps_of(timm.create_model("resnet18"))


@pytest.mark.parametrize("name", ["crate_digits", "crate_strict_digits", "vit_digits"])
def test_the_patches_that_make_an_atom_fire(name):
    model = built(name)
    images = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    found = strongest(model, images.split(3), prefix=1, keep=4)
    seen = [look_into(model, one[None], 2).code[1:] for one in images]
    codes = torch.stack(seen).numpy()  # images, patches, atoms
    signed = name == "crate_strict_digits"
    size = np.abs(codes) if signed else codes
    atoms = found[2]
    np.testing.assert_allclose(atoms.fires.numpy(), (size > 0).mean((0, 1)), atol=1e-6)
    for atom in range(0, codes.shape[-1], 7):
        best = np.sort(size[..., atom].flatten())[::-1][:4]
        shown = atoms.values[atom].numpy()
        for k in range(4):
            if best[k] <= 0:
                assert np.isnan(shown[k])
                continue
            value = codes[atoms.images[atom, k], atoms.patches[atom, k], atom]
            assert shown[k] == pytest.approx(value, rel=1e-4, abs=1e-6)
            assert abs(shown[k]) == pytest.approx(best[k], rel=1e-4, abs=1e-6)
