"""One contract over every model registered here: what timm's users and tools rely on."""

import copy
import json
import re
from dataclasses import dataclass, field

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from pellucid.errors import ConfigError
from pellucid.models import create_model, export, list_models, load
from pellucid.models.saved import describe_model

CLASSES = 3
SMALL = {"embed_dim": 32, "num_heads": 4, "num_classes": CLASSES}


@dataclass(frozen=True)
class Family:
    """Models that share a class and its options.

    Attributes:
        options: what makes them small, besides ``SMALL``.
        registers: whether they take ``reg_tokens``.
        class_token: whether they take ``class_token=False``.
        first_token: whether the class token is there from the first layer on.
        onnx: what ONNX has no operator for, in the words of the refusal.
    """

    options: dict = field(default_factory=dict)
    registers: bool = True
    class_token: bool = True
    first_token: bool = True
    onnx: str = ""


# By how the names begin; the longest beginning that fits counts. A new family is a line.
FAMILIES = {
    "crate_": Family(),
    "crate_alpha_": Family(),
    "crate_mae_": Family(registers=False),
    "crate_strict_": Family(onnx="No ONNX function .*cholesky"),
    "mhsa_ista_": Family(),
    "mhsa_mlp_": Family(),
    "mssa_mlp_": Family(),
    "tost_": Family(registers=False, class_token=False, first_token=False),
    "vit_": Family(class_token=False),
    "vit_mae_": Family(registers=False),
}


def family_of(name):
    """The beginning under which the model stands in FAMILIES; None for a model of no family."""
    return max((start for start in FAMILIES if name.startswith(start)), key=len, default=None)


ALL = [name for name in list_models() if family_of(name) is not None]
# Made small, those whose names differ in a size alone are one and the same.
NAMES = list({re.sub("tiny|small|medium|base|large|huge", "", name): name for name in ALL}.values())
OURS = [name for name in NAMES if family_of(name) != "vit_"]
SMALLEST = {family_of(name): name for name in NAMES if name.endswith("_digits")}
every_name = pytest.mark.parametrize("name", ALL)
every_model = pytest.mark.parametrize("name", NAMES)
every_one_of_ours = pytest.mark.parametrize("name", OURS)
every_family = pytest.mark.parametrize("name", SMALLEST.values())
sizes = pytest.mark.parametrize("grid", [(2, 3), (4, 2)], ids=["2x3", "4x2"])


def patch_of(name):
    found = re.search(r"patch(\d+)", name)
    return int(found[1]) if found else 2


def chans_of(name):
    return 1 if name.endswith("digits") else 3


def small(name, grid=(2, 3), **options):
    """The model with its own patches and options, 32 wide and two layers deep, for a few patches."""
    size = (grid[0] * patch_of(name), grid[1] * patch_of(name))
    options = {"depth": 2, "img_size": size, **SMALL, **FAMILIES[family_of(name)].options, **options}
    return create_model(name, **options)


def images(name, grid=(2, 3), batch=2):
    return torch.randn(batch, chans_of(name), grid[0] * patch_of(name), grid[1] * patch_of(name))


def grid_of(model):
    return (model.embed if hasattr(model, "embed") else model.patch_embed).grid_size


def layers_of(model):
    return model.layers if hasattr(model, "layers") else model.blocks


def inner_prefix(name, model):
    """Tokens before the patches inside the layers."""
    return model.num_prefix_tokens if FAMILIES[family_of(name)].first_token else 0


def loss_of(model, x):
    """A number that every parameter has a part in: a decoder has none in the scores."""
    loss = model(x).square().sum()
    if hasattr(model, "masked_loss"):
        mask = torch.arange(grid_of(model)[0] * grid_of(model)[1]).expand(len(x), -1) % 2 == 1
        loss = loss + model.masked_loss(x, mask).sum()
    return loss


def test_every_registered_model_is_held_to_the_contract():
    strangers = sorted(set(list_models()) - set(ALL))
    assert not strangers, "a new family: say in FAMILIES how it begins"
    assert len(OURS) >= 6
    assert len(NAMES) > len(OURS)
    assert {family_of(name) for name in NAMES} == SMALLEST.keys(), "every family has a model for digits"


@every_name
def test_registered_with_a_configuration_that_fits(name):
    assert timm.is_model(name)
    with torch.device("meta"):
        model = create_model(name)
    cfg = model.pretrained_cfg
    reduction = model.feature_info[0]["reduction"]
    assert reduction == patch_of(name)
    assert cfg["input_size"] == (chans_of(name), *[reduction * side for side in grid_of(model)])
    assert cfg["num_classes"] == model.num_classes
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Linear | nn.Conv2d)
    classifier = model.get_submodule(cfg["classifier"])
    assert isinstance(classifier, nn.Linear if model.num_classes else nn.Identity)
    assert classifier is model.get_classifier()
    assert len(cfg["mean"]) == len(cfg["std"]) == chans_of(name)


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
        assert logits.dtype == torch.float32
        assert torch.equal(model.forward_head(features), logits)
        assert torch.equal(model.get_classifier()(pooled), logits)


@every_model
def test_every_parameter_gets_a_gradient(name):
    model = small(name)
    loss_of(model, images(name)).backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@every_model
@sizes
def test_forward_intermediates(name, grid):
    model, x, n = small(name, grid, depth=3).eval(), images(name, grid), grid[0] * grid[1]
    prefix, width = inner_prefix(name, model), model.num_features
    with torch.no_grad():
        features = model.forward_features(x)
        final, maps = model.forward_intermediates(x)
        torch.testing.assert_close(final, features)
        assert [tuple(m.shape) for m in maps] == [(2, width, *grid)] * 3

        final, lists = model.forward_intermediates(x, norm=True, output_fmt="NLC", return_prefix_tokens=True)
        assert [tuple(p.shape) for p, _ in lists] == [(2, n, width)] * 3
        assert [tuple(t.shape) for _, t in lists] == [(2, prefix, width)] * 3
        if FAMILIES[family_of(name)].first_token:
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
    ran = []
    for i, block in enumerate(layers_of(model)):
        first_step = next(iter(block.values())) if isinstance(block, nn.ModuleDict) else block
        first_step.register_forward_hook(lambda *_, i=i: ran.append(i))
    with torch.no_grad():
        first = model.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
        assert ran == [0, 1, 2]
        ran.clear()
        early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)[0]
    assert ran == [0]
    torch.testing.assert_close(early, first)


@every_model
@sizes
def test_get_intermediate_layers(name, grid):
    model, x = small(name, grid, depth=3).eval(), images(name, grid)
    prefix = inner_prefix(name, model)
    with torch.no_grad():
        (last,) = model.get_intermediate_layers(x, norm=True)
        assert last.shape == (2, grid[0] * grid[1], model.num_features)
        if FAMILIES[family_of(name)].first_token:
            torch.testing.assert_close(last, model.forward_features(x)[:, prefix:])
        maps = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        pairs = model.get_intermediate_layers(x, n=[0, 2], reshape=True, return_prefix_tokens=True)
        for (patches, tokens), expected in zip(pairs, maps, strict=True):
            torch.testing.assert_close(patches, expected)
            assert tokens.shape == (2, prefix, model.num_features)


@every_model
def test_prune_intermediate_layers(name):
    model, x = small(name, depth=3).eval(), images(name)
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        assert list(model.prune_intermediate_layers([0, 1])) == [0, 1]
        kept = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert len(layers_of(model)) == 2
    assert model.num_classes == 0
    for actual, wanted in zip(kept, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@every_model
@sizes
def test_features_only(name, grid):
    net = small(name, grid, depth=3, features_only=True, out_indices=(0, 2), num_classes=0).eval()
    x = images(name, grid)
    with torch.no_grad():
        maps = net(x)
        expected = net.model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert net.feature_info.channels() == [m.shape[1] for m in maps]
    assert net.feature_info.reduction() == [patch_of(name)] * 2
    for actual, wanted in zip(maps, expected, strict=True):
        assert actual.shape[2:] == grid
        torch.testing.assert_close(actual, wanted)


@every_model
def test_reset_classifier(name):
    model, x = small(name), images(name)
    body = {k: v for k, v in copy.deepcopy(model.state_dict()).items() if not k.startswith("head.")}
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(x).shape == (2, 7)
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, model.num_features)
    if name in OURS:
        model.reset_classifier(0, "")
        assert model(x).shape == (2, model.num_prefix_tokens + 6, model.num_features)
        left = model.state_dict()
        assert left.keys() == body.keys()
        counted = [key for key in left if "running" in key or "num_batches" in key]  # by the calls above
        assert all(torch.equal(left[key], body[key]) for key in left.keys() - counted)
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
        loss_of(model, x).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-6, atol=1e-7)


@every_one_of_ours
def test_positions_and_learned_tokens_do_not_decay(name):
    registers = {"reg_tokens": 2} if FAMILIES[family_of(name)].registers else {}
    model = small(name, **registers)
    by_id = {id(p): key for key, p in model.named_parameters()}
    spared = model.no_weight_decay()
    undecayed, decayed = param_groups_weight_decay(model, 0.1, no_weight_decay_list=spared)
    assert undecayed["weight_decay"] == 0
    free = {by_id[id(p)] for p in undecayed["params"]}
    assert {key for key in by_id.values() if key.endswith(("pos_embed", "_token", "_tokens"))} <= free
    assert spared & set(by_id.values()) <= free
    assert any(len(p.shape) == 2 and by_id[id(p)].startswith("layers") for p in decayed["params"])
    assert len(free) + len(decayed["params"]) == len(by_id)


@every_model
@pytest.mark.parametrize("coarse", [False, True])
def test_parameters_sort_into_layers(name, coarse):
    model = small(name, depth=3)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    grouped = [key for keys in groups.values() for key in keys]
    assert sorted(grouped) == sorted(key for key, _ in model.named_parameters())
    assert len(groups) >= 5  # stem, three layers, head
    assert any("proj" in key for key in groups[min(groups)])
    assert any(key.startswith("head") for key in groups[max(groups)])
    group_of = {key: group for group, keys in groups.items() for key in keys}
    layer = "layers" if name in OURS else "blocks"
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
    layer = "layers" if name in OURS else "blocks"
    ladder = [
        next(v for k, v in by_name.items() if "embed" in k and "proj" in k),
        *[next(v for k, v in by_name.items() if k.startswith(f"{layer}.{i}.")) for i in range(3)],
        by_name["head.weight"],
    ]
    assert ladder == sorted(ladder)
    assert len(set(ladder)) == 5
    assert ladder[-1] == 1.0


@every_one_of_ours
def test_dynamic_image_size(name):
    fixed, dynamic = small(name).eval(), small(name, dynamic_img_size=True).eval()
    dynamic.load_state_dict(fixed.state_dict())
    with torch.no_grad():
        x = images(name)
        assert torch.equal(dynamic(x), fixed(x))
        larger = images(name, (5, 4))
        assert dynamic.forward_features(larger).shape == (
            2,
            dynamic.num_prefix_tokens + 20,
            dynamic.num_features,
        )
        _, maps = dynamic.forward_intermediates(larger)
        assert maps[0].shape[-2:] == (5, 4)
        # For good, or for once: the same resampled positions.
        once = dynamic(larger)
        fixed.set_input_size((5 * patch_of(name), 4 * patch_of(name)))
        torch.testing.assert_close(fixed(larger), once)
        assert fixed.embed.grid_size == (5, 4)
        with pytest.raises(ValueError, match="dynamic_img_size=True"):
            fixed(x)
    loss_of(fixed.train(), larger).backward()
    assert all(p.grad is not None for p in fixed.parameters())  # the resampled positions learn on


@every_one_of_ours
def test_resampling_keeps_positions_that_are_constant_and_the_class_position(name):
    model = small(name)
    learned = [key for key, _ in model.named_parameters() if key.endswith("pos_embed")]
    before = copy.deepcopy(model.state_dict())
    first = inner_prefix(name, model)
    with torch.no_grad():
        for key in learned:
            positions = model.get_parameter(key)
            positions[:, :first] = -1.0
            positions[:, first:] = 0.25
    model.set_input_size((3 * patch_of(name), 5 * patch_of(name)))
    for key in learned:
        positions = model.get_parameter(key)
        assert positions.shape[1] == first + 15
        assert positions.requires_grad
        torch.testing.assert_close(positions[:, :first], torch.full_like(positions[:, :first], -1.0))
        torch.testing.assert_close(positions[:, first:], torch.full_like(positions[:, first:], 0.25))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in after.keys() - learned)


@every_one_of_ours
def test_pools(name):
    registers = {"reg_tokens": 2} if FAMILIES[family_of(name)].registers else {}
    model, x = small(name, **registers).eval(), images(name)
    prefix = 1 + len(registers) * 2
    with torch.no_grad():
        tokens = model.forward_features(x)
        assert tokens.shape[1] == prefix + 6
        expected = {"token": tokens[:, 0], "avg": tokens[:, prefix:].mean(1), "": tokens}
        for pool, features in expected.items():
            model.reset_classifier(0, pool)
            torch.testing.assert_close(model(x), features)
            built = small(name, **registers, global_pool=pool, num_classes=0).eval()
            built.load_state_dict(model.state_dict())
            torch.testing.assert_close(built(x), features)


@pytest.mark.parametrize("name", [name for name in OURS if FAMILIES[family_of(name)].class_token])
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


@every_model
def test_a_step_in_bfloat16_moves_every_parameter(name):
    model = small(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, images(name))
    loss.float().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())
    without = [key for key, p in model.named_parameters() if not p.grad.any()]
    assert not without


# --- on disk, compiled and exported: one model of each family ----------------------------------------------


@every_family
def test_saved_and_loaded_it_gives_the_same_bits(name, tmp_path):
    """By us, by timm and by transformers."""
    transformers = pytest.importorskip("transformers")
    model, x = small(name, (2, 3)).eval(), images(name)
    size = (2 * patch_of(name), 3 * patch_of(name))
    weights = model.state_dict()
    classes = [f"class {i}" for i in range(CLASSES)]
    facts = {"class_names": classes, "mean": [0.3], "std": [0.4], "img_size": size, "in_chans": 1}
    (tmp_path / "config.json").write_text(json.dumps(describe_model(model, weights, **facts)))
    save_file(weights, tmp_path / "model.safetensors")
    with torch.no_grad():
        logits = model(x)
        assert torch.equal(load(tmp_path)(x), logits)
        theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(theirs(x), logits)
        theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(theirs(x).logits, logits)
        assert list(theirs.config.id2label.values()) == classes


AHEAD = [
    pytest.param(
        name, "aot_eager", marks=[] if family in ("crate_", "crate_alpha_", "tost_") else pytest.mark.slow
    )
    for family, name in SMALLEST.items()
]
INDUCTOR = pytest.param(SMALLEST["crate_"], "inductor", marks=pytest.mark.slow)
"""What is captured is compiled without a family's doing, in half a minute and more; one stands for all."""


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("name", "backend"), [*AHEAD, INDUCTOR])
def test_compiles_whole_in_training_and_evaluation(name, backend):
    model, x = small(name), images(name)
    gradients = []
    for forward in (model.train(), torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        out = forward(x)
        out.square().sum().backward()
        gradients.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) > 10
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    model.eval()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("unchecked_shapes")
@every_family
def test_exports_as_a_program(name, tmp_path):
    model = small(name)
    written = export.export_program(model, tmp_path / "model.pt2", images=[images(name, batch=5)])
    assert written.difference < 1e-5
    assert written.images == 5
    assert written.description["output_shape"] == ["batch", CLASSES]


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if family in ("crate_", "crate_alpha_") else pytest.mark.slow)
        for family, name in SMALLEST.items()
    ],
)
def test_exports_as_onnx(name, tmp_path):
    pytest.importorskip("onnxruntime")
    lacking = FAMILIES[family_of(name)].onnx
    model, path, pictures = small(name, depth=1), tmp_path / "model.onnx", [images(name, batch=5)]
    if lacking:
        with pytest.raises(ConfigError, match=lacking):
            export.export_onnx(model, path, images=pictures)
        return
    written = export.export_onnx(model, path, images=pictures)
    assert written.difference < 1e-5
    assert written.description["input_shape"] == ["batch", *pictures[0].shape[1:]]
