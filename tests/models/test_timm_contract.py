"""One contract over every model registered here: what timm's users and tools rely on."""

import copy

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from pellucid.models import CRATE, create_model, list_models

CLASSES = 3
OURS = [name for name in list_models() if name.startswith("crate")]
every_model = pytest.mark.parametrize("name", list_models())
every_crate = pytest.mark.parametrize("name", OURS)
sizes = pytest.mark.parametrize("grid", [(2, 3), (4, 2)], ids=["2x3", "4x2"])


def patch_of(name):
    return 16 if "patch16" in name else 4 if "patch4" in name else 2


def chans_of(name):
    return 1 if name.endswith("digits") else 3


def small(name, grid=(2, 3), **options):
    """The model at its own width and heads, two layers deep, for a few patches."""
    patch = patch_of(name)
    options = {"depth": 2, "num_classes": CLASSES, "img_size": (grid[0] * patch, grid[1] * patch), **options}
    return create_model(name, **options)


def images(name, grid=(2, 3), batch=2):
    patch = patch_of(name)
    return torch.randn(batch, chans_of(name), grid[0] * patch, grid[1] * patch)


def test_there_is_something_to_hold_to_the_contract():
    assert len(OURS) >= 6
    assert len(list_models()) > len(OURS)


@every_model
def test_registered_with_a_configuration_that_fits(name):
    assert timm.is_model(name)
    model = create_model(name, depth=1)
    cfg = model.pretrained_cfg
    assert cfg["input_size"] == (
        chans_of(name),
        *[model.feature_info[0]["reduction"] * s for s in grid_of(model)],
    )
    assert cfg["num_classes"] == model.num_classes
    for key in ("first_conv", "classifier"):
        assert isinstance(model.get_submodule(cfg[key]), (nn.Linear, nn.Conv2d))
    assert len(cfg["mean"]) == len(cfg["std"]) == chans_of(name)


def grid_of(model):
    return model.embed.grid_size if isinstance(model, CRATE) else model.patch_embed.grid_size


@every_model
@sizes
def test_forward_features_and_head(name, grid):
    model, x = small(name, grid).eval(), images(name, grid)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, model.num_prefix_tokens + grid[0] * grid[1], model.num_features)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        logits = model(x)
        assert logits.shape == (2, CLASSES)
        assert torch.equal(model.forward_head(features), logits)
        assert torch.equal(model.get_classifier()(pooled), logits)


@every_model
def test_every_parameter_gets_a_gradient(name):
    model = small(name)
    model(images(name)).square().sum().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@every_model
@sizes
def test_forward_intermediates(name, grid):
    model, x, n = small(name, grid, depth=3).eval(), images(name, grid), grid[0] * grid[1]
    prefix, width = model.num_prefix_tokens, model.num_features
    with torch.no_grad():
        features = model.forward_features(x)
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, features)
        assert [tuple(m.shape) for m in maps] == [(2, width, *grid)] * 3

        final, lists = model.forward_intermediates(x, norm=True, output_fmt="NLC", return_prefix_tokens=True)
        assert [tuple(p.shape) for p, _ in lists] == [(2, n, width)] * 3
        assert [tuple(t.shape) for _, t in lists] == [(2, prefix, width)] * 3
        torch.testing.assert_close(lists[-1][0], features[:, prefix:])
        torch.testing.assert_close(lists[-1][1], features[:, :prefix])

        # Row by row: map[h, w] is token h * columns + w.
        only = model.forward_intermediates(x, norm=True, intermediates_only=True)
        for image, (patches, _) in zip(only, lists, strict=True):
            torch.testing.assert_close(image.flatten(2).mT, patches)

        chosen = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        assert len(chosen) == 2
        torch.testing.assert_close(chosen[0], maps[0])
        torch.testing.assert_close(chosen[1], maps[2])
        last = model.forward_intermediates(x, indices=1, intermediates_only=True)
        assert len(last) == 1
        torch.testing.assert_close(last[0], maps[2])


@every_model
def test_stop_early_runs_no_further(name):
    model, x = small(name, depth=3).eval(), images(name)
    blocks, ran = list(model.layers if isinstance(model, CRATE) else model.blocks), []
    for i, block in enumerate(blocks):
        inner = block["compress"] if isinstance(block, nn.ModuleDict) else block
        inner.register_forward_hook(lambda *_, i=i: ran.append(i))
    with torch.no_grad():
        first = model.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
        assert ran == [0, 1, 2]
        ran.clear()
        early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)[0]
    assert ran == [0]
    torch.testing.assert_close(early, first)


@every_model
def test_get_intermediate_layers(name):
    model, x = small(name, depth=3).eval(), images(name)
    with torch.no_grad():
        features = model.forward_features(x)
        (last,) = model.get_intermediate_layers(x, norm=True)
        torch.testing.assert_close(last, features[:, model.num_prefix_tokens :])
        pairs = model.get_intermediate_layers(x, n=[0, 2], reshape=True, return_prefix_tokens=True)
        assert len(pairs) == 2
        for patches, prefix in pairs:
            assert patches.shape == (2, model.num_features, 2, 3)
            assert prefix.shape == (2, model.num_prefix_tokens, model.num_features)


@every_model
def test_prune_intermediate_layers(name):
    model, x = small(name, depth=3).eval(), images(name)
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        assert list(model.prune_intermediate_layers([0, 1])) == [0, 1]
        kept = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert len(model.layers if isinstance(model, CRATE) else model.blocks) == 2
    for actual, wanted in zip(kept, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@every_model
def test_features_only(name):
    torch.manual_seed(0)
    net = small(name, depth=3, features_only=True, out_indices=(0, 2), num_classes=0).eval()
    x = images(name)
    with torch.no_grad():
        maps = net(x)
        expected = net.model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert net.feature_info.channels() == [m.shape[1] for m in maps]
    assert net.feature_info.reduction() == [patch_of(name)] * 2
    assert len(maps) == 2
    for actual, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@every_model
def test_reset_classifier(name):
    model, x = small(name), images(name)
    body = copy.deepcopy(model.state_dict())
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(x).shape == (2, 7)
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, model.num_features)
    if isinstance(model, CRATE):
        model.reset_classifier(0, "")
        assert model(x).shape == (2, model.num_prefix_tokens + 6, model.num_features)
        for key, value in model.state_dict().items():
            assert torch.equal(value, body[key])
    low = small(name).bfloat16()
    low.reset_classifier(4)
    assert low(x.bfloat16()).dtype == torch.bfloat16


@every_model
def test_recomputation_changes_no_gradient(name):
    model, x = small(name).train(), images(name)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-6, atol=1e-7)


@every_crate
def test_names_without_weight_decay_exist_and_are_obeyed(name):
    model = small(name, reg_tokens=2)
    names = {key for key, _ in model.named_parameters()}
    assert model.no_weight_decay() <= names
    assert len(model.no_weight_decay()) == 3
    undecayed, decayed = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    assert undecayed["weight_decay"] == 0
    by_id = {id(p): key for key, p in model.named_parameters()}
    free = {by_id[id(p)] for p in undecayed["params"]}
    assert model.no_weight_decay() <= free
    assert any("dictionary" in by_id[id(p)] for p in decayed["params"])
    assert len(free) + len(decayed["params"]) == len(names)


@every_model
@pytest.mark.parametrize("coarse", [False, True])
def test_parameters_sort_into_layers(name, coarse):
    model = small(name, depth=3)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    grouped = [key for keys in groups.values() for key in keys]
    assert sorted(grouped) == sorted(key for key, _ in model.named_parameters())
    assert len(groups) >= 5  # stem, three layers, head
    first = groups[min(groups)]
    assert any("pos_embed" in key for key in first)
    assert any(key.startswith("head") for key in groups[max(groups)])
    group_of = {key: group for group, keys in groups.items() for key in keys}
    layer = "layers" if isinstance(model, CRATE) else "blocks"
    of_layers = [{g for key, g in group_of.items() if key.startswith(f"{layer}.{i}.")} for i in range(3)]
    assert [len(found) for found in of_layers] == [1, 1, 1]  # the whole of a layer in one group of its own
    assert len(set.union(*of_layers)) == 3


@every_model
def test_layer_decay_slows_the_early_layers(name):
    model = small(name, depth=3)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    by_name = {key: scale[id(p)] for key, p in model.named_parameters()}
    assert len(by_name) == len(scale)
    layer = "layers" if isinstance(model, CRATE) else "blocks"
    ladder = [
        next(v for k, v in by_name.items() if "pos_embed" in k),
        *[next(v for k, v in by_name.items() if k.startswith(f"{layer}.{i}.")) for i in range(3)],
        by_name["head.weight"],
    ]
    assert ladder == sorted(ladder)
    assert len(set(ladder)) == 5
    assert ladder[-1] == 1.0


@every_crate
def test_dynamic_image_size(name):
    fixed, dynamic = small(name).eval(), small(name, dynamic_img_size=True).eval()
    dynamic.load_state_dict(fixed.state_dict())
    with torch.no_grad():
        x = images(name)
        assert torch.equal(dynamic(x), fixed(x))
        larger = images(name, (5, 4))
        assert dynamic.forward_features(larger).shape == (2, 21, dynamic.num_features)
        _, maps = dynamic.forward_intermediates(larger)
        assert maps[0].shape[-2:] == (5, 4)
        # For good, or for once: the same resampled positions.
        once = dynamic(larger)
        fixed.set_input_size((5 * patch_of(name), 4 * patch_of(name)))
        torch.testing.assert_close(fixed(larger), once)
        assert fixed.embed.grid_size == (5, 4)
        with pytest.raises(ValueError, match="dynamic_img_size=True"):
            fixed(x)


@every_crate
def test_resampling_keeps_positions_that_are_constant_and_the_class_position(name):
    model = small(name)
    with torch.no_grad():
        model.embed.pos_embed[:, 0] = -1.0
        model.embed.pos_embed[:, 1:] = 0.25
    model.set_input_size((3 * patch_of(name), 5 * patch_of(name)))
    positions = model.embed.pos_embed
    assert positions.shape[1] == 16
    assert positions.requires_grad
    torch.testing.assert_close(positions[:, 0], torch.full_like(positions[:, 0], -1.0))
    torch.testing.assert_close(positions[:, 1:], torch.full_like(positions[:, 1:], 0.25))


@every_crate
def test_pools(name):
    model, x = small(name, reg_tokens=2).eval(), images(name)
    with torch.no_grad():
        tokens = model.forward_features(x)
        assert tokens.shape[1] == 1 + 2 + 6
        expected = {"token": tokens[:, 0], "avg": tokens[:, 3:].mean(1), "": tokens}
        for pool, features in expected.items():
            model.reset_classifier(0, pool)
            torch.testing.assert_close(model(x), features)
            built = small(name, reg_tokens=2, global_pool=pool, num_classes=0).eval()
            built.load_state_dict(model.state_dict())
            torch.testing.assert_close(built(x), features)


@every_crate
def test_without_a_class_token(name):
    model, x = small(name, class_token=False, global_pool="avg").eval(), images(name)
    assert model.num_prefix_tokens == 0
    assert model.embed.pos_embed.shape[1] == 6
    with torch.no_grad():
        assert model.forward_features(x).shape == (2, 6, model.num_features)
        assert model(x).shape == (2, CLASSES)
        patches, prefix = model.get_intermediate_layers(x, return_prefix_tokens=True)[0]
        assert (patches.shape[1], prefix.shape[1]) == (6, 0)
    with pytest.raises(ValueError, match="needs class_token=True"):
        model.reset_classifier(3, "token")
    model.set_input_size((3 * patch_of(name), 3 * patch_of(name)))
    assert model(images(name, (3, 3))).shape == (2, CLASSES)


@every_model
def test_one_image_does_not_depend_on_its_batch(name):
    model, x = small(name).eval().double(), images(name, batch=3).double()
    with torch.no_grad():
        together = model(x)
        for i in range(3):
            torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            model(torch.cat([x[:1], 9 * x[1:]]))[0], together[0], rtol=1e-9, atol=1e-11
        )


@every_model
def test_bfloat16(name):
    model, x = small(name).eval(), images(name)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x)
        pure = model.bfloat16()(x.bfloat16())
    for low in (mixed, pure):
        assert low.dtype == torch.bfloat16
        assert low.isfinite().all()
        assert (low.float() - exact).norm() < 0.1 * exact.norm()


@every_crate
@pytest.mark.parametrize("compression", ["tied", "untied", "exact"])
@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_every_choice_of_parts_trains(name, compression, stem):
    model = small(name, compression=compression, stem=stem, init="published")
    model(images(name)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    free = any("output" in key for key, _ in model.named_parameters())
    assert free == (compression == "untied")
