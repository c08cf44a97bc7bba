"""The published sequences of operations: those of the recorded programs, equal to ours in every gradient."""

import pytest
import torch

from pellucid.measure.published_arithmetic import has_published_form, published_twin
from pellucid.models import create_model, from_published
from pellucid.steps import ISTA

DIGITS = ("crate_digits", "crate_alpha_digits", "tost_digits", "mssa_mlp_digits", "mhsa_ista_digits")


def state_of(data):
    return {key.removeprefix("state/"): v for key, v in data.items() if key.startswith("state/")}


@pytest.mark.parametrize(
    ("fixture", "hints"),
    [("crate", {"num_heads": 4}), ("crate_alpha", {"num_heads": 4}), ("tost_vision", {"img_size": 64})],
)
def test_it_is_the_recorded_program(fixture, hints, recorded):
    data = recorded(fixture)
    model = from_published(state_of(data), **hints).eval()
    logits = published_twin(model)(data["input"])
    torch.testing.assert_close(logits, data["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DIGITS)
@pytest.mark.parametrize("options", [{}, {"compression": "untied"}], ids=["default", "untied"])
@pytest.mark.parametrize("batch", [3, 9])  # fewer tokens than dimensions, and more: two products, and one
def test_equals_ours_in_output_and_gradient(name, options, batch):
    if options and name.startswith("mhsa"):
        pytest.skip("has no compression of ours")
    model = create_model(name, **options).double()
    scatter(model)
    images = torch.randn(batch, 1, 8, 8, dtype=torch.float64)
    answers = []
    for forward in (model, published_twin(model)):
        model.zero_grad()
        logits = forward(images)
        logits.square().sum().backward()
        answers.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, published in zip(*answers, strict=True):
        assert published.norm() > 0
        assert (ours - published).norm() <= 1e-7 * published.norm() + 1e-12
    with torch.inference_mode():
        kept = model.eval()(images)
    assert (kept - answers[1][0]).norm() <= 1e-7 * kept.norm()


def test_a_masked_autoencoder_reconstructs_the_same():
    model = create_model("crate_mae_digits", encode="all", compression="untied").double()
    scatter(model)
    images = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    mask = model.random_mask(3)
    ours, published = model.reconstruct(images, mask), published_twin(model).reconstruct(images, mask)
    assert (ours - published).norm() <= 1e-12 * published.norm()
    assert published.norm() > 0


def scatter(model):
    """Biases, scales and temperatures away from where they begin, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_the_twin_is_another_sequence_on_the_same_parameters():
    model = create_model("crate_digits")
    twin = published_twin(model)
    assert {id(p) for p in model.parameters()} == {id(p) for p in twin.parameters()}
    assert "forward" not in vars(model.layers[0]["compress"])
    for layer in twin.layers:
        for step in layer.values():
            assert "forward" in vars(step)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ISTA):
                module.dictionary *= 2
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(twin(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("crate_digits", {}, True),
        ("crate_digits", {"compression": "exact"}, False),
        ("crate_digits", {"sparsification": "soft"}, False),
        ("crate_digits", {"residual": True}, False),
        ("crate_alpha_digits", {}, True),
        ("crate_mae_digits", {}, True),
        ("tost_digits", {"compression": "tied", "sparsification": "ista"}, True),
        ("mhsa_mlp_digits", {}, False),
        ("vit_digits", {}, False),
    ],
)
def test_what_has_a_published_form(name, options, expected):
    assert has_published_form(create_model(name, **options)) == expected
