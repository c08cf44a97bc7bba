"""ToST beyond what was recorded."""

import pytest
import torch

from pellucid.models import ToST, create_model
from pellucid.steps import MLP, TSSA, OvercompleteISTA, UntiedTSSA

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("compression", "sparsification", "steps"),
    [
        ("untied", "mlp", (UntiedTSSA, MLP)),
        ("tied", "mlp", (TSSA, MLP)),
        ("untied", "ista", (UntiedTSSA, OvercompleteISTA)),
        ("tied", "ista", (TSSA, OvercompleteISTA)),
    ],
)
def test_both_halves_of_a_layer_can_be_chosen(compression, sparsification, steps, images):
    model = ToST(compression=compression, sparsification=sparsification, **SIZES)
    for layer in model.layers:
        assert tuple(type(step) for step in layer.values()) == steps
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_the_class_token_joins_behind_the_layers(images):
    model = ToST(**SIZES).eval()
    records = []
    features = model.forward_features(images, on_step=records.append)
    assert {record.z.shape[1] for record in records} == {16}
    assert features.shape == (4, 17, 24)
    assert model.num_prefix_tokens == 1
    _, inside = model.forward_intermediates(images)
    assert [t.shape for t in inside] == [(4, 24, 4, 4)] * 2


def test_without_a_class_token_patches_are_averaged(images):
    model = ToST(class_depth=0, global_pool="avg", **SIZES).eval()
    features = model.forward_features(images)
    assert features.shape == (4, 16, 24)
    torch.testing.assert_close(model(images), model.head(features.mean(1)))
    with pytest.raises(ValueError, match="global_pool='token' needs"):
        ToST(class_depth=0, **SIZES)


def test_its_norms_learn_statistics_on_a_cpu(images):
    model = ToST(**SIZES).train()
    before = model.embed.stem.proj[0][1].running_mean.clone()
    model(images).square().sum().backward()
    assert not torch.equal(model.embed.stem.proj[0][1].running_mean, before)


def test_any_image_size_with_positions_from_sines(images):
    model = ToST(dynamic_img_size=True, **SIZES).eval()
    assert model(torch.rand(2, 3, 40, 24)).shape == (2, 5)
    with pytest.raises(ValueError, match="images are 40 x 24"):
        ToST(**SIZES)(torch.rand(2, 3, 40, 24))


@pytest.mark.parametrize("patch", [2, 4, 8, 16])
def test_the_stem_halves_the_picture_down_to_a_patch(patch):
    model = ToST(**{**SIZES, "patch_size": patch})
    convolutions = [m for m in model.embed.stem.modules() if isinstance(m, torch.nn.Conv2d)]
    assert 2 ** len(convolutions) == patch
    assert [c.out_channels for c in convolutions] == [24 // 2**i for i in reversed(range(len(convolutions)))]
    assert model.embed.stem(torch.rand(1, 3, 32, 32)).shape == (1, (32 // patch) ** 2, 24)


@pytest.mark.parametrize(("patch", "dim", "message"), [
    (6, 24, "not a power of two"), ((8, 4), 24, "not a power of two"), (16, 12, "a width that 8 divides"),
])  # fmt: skip
def test_patches_that_the_stem_cannot_make(patch, dim, message):
    with pytest.raises(ValueError, match=message):
        ToST(**{**SIZES, "img_size": 48, "patch_size": patch, "embed_dim": dim})


@pytest.mark.usefixtures("unchecked_shapes")
def test_options_that_do_not_exist():
    with pytest.raises(ValueError, match="compression is 'exact'"):
        ToST(compression="exact", **SIZES)
    with pytest.raises(ValueError, match="sparsification is 'soft'"):
        ToST(sparsification="soft", **SIZES)


def test_scales_and_temperatures_do_not_decay():
    """The published recipe decays the temperature, which its own list forgot."""
    model = create_model("tost_tiny_12_patch16_224", img_size=32)
    kept = model.no_weight_decay()
    assert "layers.0.compress.temperature" in kept
    assert "layers.3.sparsify.layer_scale" in kept
    assert "class_attention.1.gamma2" in kept
    assert "class_token" in kept
    assert kept <= {name for name, _ in model.named_parameters()} | {
        "embed.pos_embed",
        "embed.class_token",
        "embed.reg_tokens",
    }
