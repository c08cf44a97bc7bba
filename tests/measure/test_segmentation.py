"""Masks by hand, on pictures whose two regions cannot be missed, and on every kind of model."""

import pytest
import timm
import torch
from torch import nn

from pellucid.errors import ConfigError, NumericsError
from pellucid.measure import attention_maps
from pellucid.measure.segmentation import (
    default_layer,
    enlarged,
    head_masks,
    intersection_over_union,
    look,
    mask_cut,
    pca_colours,
    token_cut,
)
from pellucid.models import CRATE, ToST, create_model
from pellucid.models.embed import image_size, resized

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}


# --- thresholds -------------------------------------------------------------------------------------------


def test_by_count_by_hand():
    heads = torch.tensor([[0.1, 0.5, 0.2, 0.15, 0.05], [0.2, 0.2, 0.2, 0.2, 0.2]])
    assert head_masks(heads, 0.6).tolist() == [
        [False, True, True, True, False],
        [True, True, True, False, False],
    ]
    assert head_masks(heads, 0.01).sum(-1).tolist() == [1, 1]
    assert head_masks(heads, 1.0).all()


def test_by_mass_by_hand():
    heads = torch.tensor([[0.1, 0.5, 0.2, 0.15, 0.05], [0.2, 0.2, 0.2, 0.2, 0.2], [1.0, 0, 0, 0, 0]])
    # 0.5 holds less than 0.6, with 0.2 it is enough; three fifths are three equal patches; one holds it all.
    assert head_masks(heads, 0.6, "mass").tolist() == [
        [False, True, True, False, False],
        [True, True, True, False, False],
        [True, False, False, False, False],
    ]
    assert head_masks(heads[2:], 1.0, "mass").tolist() == [[True, False, False, False, False]]
    assert head_masks(torch.zeros(1, 4), 0.6, "mass").sum() == 1


def test_mass_as_dinos_program_keeps_it():
    """Ascending, cumulated, above 1 - share: written another way round."""
    heads = torch.rand(20, 30).double()
    values, order = (heads / heads.sum(-1, keepdim=True)).sort(dim=-1)
    kept = torch.zeros(20, 30, dtype=torch.bool).scatter(-1, order, values.cumsum(-1) > 1 - 0.6)
    assert torch.equal(head_masks(heads, 0.6, "mass"), kept)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_a_share_that_is_none(share):
    with pytest.raises(ConfigError, match="share is"):
        head_masks(torch.rand(2, 3), share)


def test_intersection_over_union_by_hand():
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]], dtype=torch.bool)
    truth = torch.tensor([[0, 1, 1], [0, 1, 0]], dtype=torch.bool)
    assert intersection_over_union(mask, truth).item() == pytest.approx(2 / 4)
    assert intersection_over_union(mask, mask).item() == 1
    assert intersection_over_union(mask, ~mask).item() == 0
    nothing = torch.zeros_like(mask)
    assert intersection_over_union(nothing, nothing).item() == 1
    assert intersection_over_union(torch.stack([mask, nothing]), truth).tolist() == [0.5, 0]


def test_enlarging_takes_the_patch_that_a_pixels_middle_lies_in():
    mask = torch.tensor([[1, 2], [3, 4]])
    assert enlarged(mask, (4, 4)).tolist() == [[1, 1, 2, 2]] * 2 + [[3, 3, 4, 4]] * 2
    assert enlarged(mask, (1, 3)).tolist() == [[3, 4, 4]]
    assert enlarged(torch.eye(3), (3, 3)).equal(torch.eye(3))
    assert enlarged(torch.arange(5)[None], (1, 2)).tolist() == [[1, 3]]


# --- cuts -------------------------------------------------------------------------------------------------

GRID = (8, 10)


def planted(*things, noise=0.05, seed=0):
    """Features of a scene: a background, and things with directions of their own."""
    torch.manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(16, 16)).Q
    features = directions[0].expand(*GRID, 16).clone()
    for i, thing in enumerate(things, start=1):
        features[thing] = directions[i]
    return (features + noise * torch.randn(*GRID, 16)).flatten(0, 1)


def thing(top, left, height, width):
    mask = torch.zeros(GRID, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


@pytest.mark.parametrize("cut", [token_cut, mask_cut])
@pytest.mark.parametrize("where", [(2, 3, 3, 4), (1, 1, 5, 6), (0, 0, 4, 3), (5, 6, 2, 2)])
def test_one_thing_is_found(cut, where):
    truth = thing(*where)
    found = cut(planted(truth), GRID)
    assert torch.equal(found[0].mask, truth)
    assert 0 < found[0].score <= 1


def test_mask_cut_finds_one_thing_after_the_other():
    things = [thing(1, 1, 3, 3), thing(5, 5, 2, 4), thing(1, 6, 2, 2)]
    found = mask_cut(planted(*things), GRID, masks=3)
    assert len(found) == 3
    for truth in things:
        assert max(intersection_over_union(each.mask, truth) for each in found) == 1
    assert torch.stack([each.mask for each in found]).sum(0).max() == 1
    assert len(mask_cut(planted(*things), GRID, masks=1)) == 1


def test_the_thing_holds_few_corners():
    """A background of few patches around a large thing: the largest entry is behind, the corners say so."""
    truth = thing(1, 1, 6, 8)
    assert truth.sum() > (~truth).sum()
    assert torch.equal(mask_cut(planted(truth), GRID, masks=1)[0].mask, truth)


def test_what_hangs_together_with_the_seed():
    far, near = thing(6, 8, 1, 1), thing(1, 1, 3, 3)
    torch.manual_seed(0)
    features = planted(far | near)
    found = token_cut(features, GRID)[0].mask
    assert torch.equal(found, near) or torch.equal(found, far)


@pytest.mark.parametrize("features", [torch.ones(80, 16), torch.zeros(80, 16)])
def test_where_all_patches_are_alike_there_is_nothing(features):
    assert token_cut(features, GRID) == []
    assert mask_cut(features, GRID) == []


def test_few_patches_are_no_graph():
    assert mask_cut(torch.randn(3, 8), (1, 3)) == []


def test_a_tau_or_a_count_that_is_none():
    with pytest.raises(ConfigError, match="tau is 2"):
        token_cut(torch.randn(80, 8), GRID, tau=2)
    with pytest.raises(ConfigError, match="masks is 0"):
        mask_cut(torch.randn(80, 8), GRID, masks=0)


# --- colours ----------------------------------------------------------------------------------------------


def test_pca_finds_the_foreground_and_its_parts():
    parts = [(2, 2, 4, 3), (2, 5, 4, 3)]
    # The directions are drawn before the noise, from one seed: the same parts in all three pictures.
    scenes = [planted(*(thing(*where) for where in parts), noise=noise) for noise in (0.01, 0.02, 0.03)]
    for found in pca_colours(scenes, [GRID] * 3):
        truth = thing(2, 2, 4, 6)
        assert torch.equal(found.foreground, truth)
        assert (found.colours[~truth] == 0).all()
        left, right = (found.colours[thing(*where)].mean(0) for where in parts)
        assert (left - right).abs().max() > 0.8
        assert found.colours.min() >= 0
        assert found.colours.max() <= 1


def test_pca_directions_are_the_uncentred_ones():
    torch.manual_seed(0)
    tokens = torch.randn(80, 6).double() + 2
    found = pca_colours([tokens], [GRID])[0]
    _, _, right = torch.linalg.svd(tokens)
    first = tokens @ right[0]
    scaled = (first - first.min()) / (first.max() - first.min())
    border = torch.ones(GRID, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    if scaled[border.flatten()].mean() > scaled[~border.flatten()].mean():
        scaled = 1 - scaled
    assert torch.equal(found.foreground.flatten(), scaled > 0.5)


def test_pca_of_patches_that_are_all_alike_is_empty():
    found = pca_colours([torch.ones(80, 5)], [GRID])[0]
    assert not found.foreground.any()
    assert (found.colours == 0).all()


def test_pca_of_two_dimensions_and_of_pictures_of_any_shape():
    found = pca_colours([torch.randn(12, 2), torch.randn(2, 2), torch.randn(5, 2)], [(3, 4), (1, 2), (5, 1)])
    assert [each.colours.shape[:2] for each in found] == [(3, 4), (1, 2), (5, 1)]
    with pytest.raises(ConfigError, match="threshold"):
        pca_colours([torch.randn(12, 2)], [(3, 4)], threshold=1)


# --- models -----------------------------------------------------------------------------------------------

MODELS = {
    "CRATE": lambda: CRATE(**SMALL),
    "CRATE with registers": lambda: CRATE(**SMALL, reg_tokens=3),
    "CRATE without a class token": lambda: CRATE(**SMALL, class_token=False, global_pool="avg"),
    "untied": lambda: CRATE(**SMALL, compression="untied"),
    "strict": lambda: CRATE(**SMALL, compression="strict", sparsification="strict"),
    "exact": lambda: CRATE(**SMALL, compression="exact"),
    "CRATE-alpha": lambda: CRATE(**SMALL, overcomplete=2, decoupled=True, residual=True),
    "MHSA and ISTA": lambda: CRATE(**SMALL, compression="mhsa"),
    "ToST": lambda: ToST(**SMALL),
    "ViT": lambda: timm.models.VisionTransformer(**SMALL),
    "ViT with registers": lambda: timm.models.VisionTransformer(**SMALL, reg_tokens=4),
    "ViT without a class token": lambda: timm.models.VisionTransformer(
        **SMALL, class_token=False, global_pool="avg"
    ),
    "DINOv2's": lambda: timm.models.VisionTransformer(
        **SMALL, reg_tokens=4, init_values=1e-5, no_embed_class=True, dynamic_img_size=True
    ),
}


@pytest.fixture(params=MODELS, ids=str)
def model(request):
    return MODELS[request.param]().eval()


def test_every_model_can_be_looked_at(model):
    seen = look(model, torch.randn(2, 3, 32, 32))
    assert seen.grid == (8, 8)
    assert seen.features.shape == (2, 64, 32)
    assert seen.heads.shape == (2, 4, 64)
    torch.testing.assert_close(seen.heads.sum(-1), torch.ones(2, 4))
    assert seen.layer == default_layer(model)


def test_the_heads_are_the_attention_maps(model):
    images = torch.randn(2, 3, 32, 32)
    maps = attention_maps(model, images)
    for layer, expected in maps.items():
        expected = expected / expected.sum(-1, keepdim=True)
        torch.testing.assert_close(look(model, images, layer).heads, expected)


@pytest.mark.parametrize("size", [(64, 32), (20, 48), (4, 100)])
def test_any_size_and_the_model_is_left_as_it_was(model, size):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = image_size(model)
    other = resized(model, size)
    seen = look(other, torch.randn(1, 3, *size))
    assert seen.grid == (size[0] // 4, size[1] // 4)
    assert seen.features.shape[1] == seen.grid[0] * seen.grid[1]
    assert image_size(model) == own
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    look(model, torch.randn(1, 3, 32, 32))
    shared = {value.data_ptr() for value in model.parameters()}
    fresh = [name for name, value in other.named_parameters() if value.data_ptr() not in shared]
    assert set(fresh) <= {"pos_embed", "embed.pos_embed"}


def test_the_default_layer():
    sizes = {**SMALL, "depth": 5}
    assert default_layer(CRATE(**sizes)) == 4
    assert default_layer(ToST(**sizes)) == 4
    assert default_layer(CRATE(**sizes, compression="mhsa", sparsification="mlp")) == 5
    assert default_layer(timm.models.VisionTransformer(**sizes)) == 5
    assert default_layer(CRATE(**{**SMALL, "depth": 1})) == 1


def test_features_are_what_the_text_says():
    images = torch.randn(1, 3, 32, 32)
    crate = CRATE(**SMALL, reg_tokens=2).eval()
    with torch.no_grad():
        step, z = crate.layers[0]["compress"], crate.embed(images)
        expected = (step.norm(z) @ step.subspaces.weight.mT)[:, 3:]
    torch.testing.assert_close(look(crate, images, 1).features, expected)
    vit = timm.models.VisionTransformer(**SMALL).eval()
    with torch.no_grad():
        z = vit._pos_embed(vit.patch_embed(images))
        expected = vit.blocks[0].attn.qkv(vit.blocks[0].norm1(z))[:, 1:, 32:64]
    torch.testing.assert_close(look(vit, images, 1).features, expected)


def test_what_cannot_be_looked_at_says_so():
    images = torch.randn(1, 3, 32, 32)
    crate = CRATE(**SMALL)
    for layer in (0, 3):
        with pytest.raises(ConfigError, match="has 1 to 2"):
            look(crate, images, layer)
    with pytest.raises(ConfigError, match="cannot look inside"):
        look(timm.create_model("test_resnet"), torch.randn(1, 3, 160, 160))
    relative = timm.create_model("test_vit_relpos")
    with pytest.raises(ConfigError, match="no heads"):
        look(relative, torch.randn(1, 3, *relative.pretrained_cfg["input_size"][1:]))
    nn.init.constant_(crate.layers[0]["compress"].subspaces.weight, float("nan"))
    with pytest.raises(NumericsError, match="NaN or infinity"):
        look(crate, images, 1)
    with pytest.raises(ConfigError, match="takes images of"):
        resized(timm.create_model("test_resnet"), (64, 64))


# --- pictures ---------------------------------------------------------------------------------------------


def two_regions():
    """A red square on green, and the truth at patches of four pixels."""
    image = torch.zeros(1, 3, 32, 32)
    image[:, 1] = 1
    image[:, :, 8:24, 12:28] = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    truth = torch.zeros(8, 8, dtype=torch.bool)
    truth[2:6, 3:7] = True
    return (image - 0.5) / 0.25, truth


def knows_colours():
    """A one-layer CRATE whose class token and projections know red from green: its answer is known."""
    sizes = {**SMALL, "depth": 1, "num_heads": 2}
    model = CRATE(**sizes, stem="conv").eval()
    with torch.no_grad():
        model.embed.stem.proj.weight.zero_()
        model.embed.stem.proj.bias.zero_()
        for channel in (0, 1):
            model.embed.stem.proj.weight[channel, channel] = 1 / 16
        model.embed.pos_embed.zero_()
        model.embed.class_token.zero_()
        model.embed.class_token[..., 0], model.embed.class_token[..., 1] = 2, -2
        model.layers[0]["compress"].subspaces.weight.copy_(torch.eye(32))
    return model


def test_a_picture_of_two_regions_is_cut_right_by_every_method():
    image, truth = two_regions()
    seen = look(knows_colours(), image)
    features = seen.features[0]
    assert torch.equal(mask_cut(features, seen.grid)[0].mask, truth)
    assert torch.equal(token_cut(features, seen.grid)[0].mask, truth)
    assert torch.equal(pca_colours([features], [seen.grid])[0].foreground, truth)
    share = truth.float().mean().item()
    assert torch.equal(head_masks(seen.heads[0, 0], share).view(8, 8), truth)
    assert torch.equal(head_masks(seen.heads[0, 0], 0.6, "mass").view(8, 8) | truth, truth)


def test_the_same_at_another_size():
    image, truth = two_regions()
    wide = torch.nn.functional.interpolate(image, (64, 96))
    seen = look(resized(knows_colours(), (64, 96)), wide)
    assert torch.equal(mask_cut(seen.features[0], seen.grid)[0].mask, enlarged(truth, (16, 24)))


def test_an_untrained_networks_cuts_are_the_same_each_time():
    model = create_model("crate_digits").eval()
    images = torch.randn(1, 1, 8, 8)
    first, second = (mask_cut(look(model, images).features[0], (4, 4)) for _ in range(2))
    assert [a.score for a in first] == [b.score for b in second]
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(first, second, strict=True))
