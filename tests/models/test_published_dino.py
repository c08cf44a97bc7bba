"""DINO's and SimDINO's backbones, both versions, in timm's ViT: equal to the published forward pass."""

import math

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import conv2d, gelu, layer_norm, linear

from pellucid.errors import CheckpointError, ConfigError
from pellucid.models import create_model, from_published, read_published
from pellucid.models.published import open_published

DIM, DEPTH, HEADS, PATCH, SIDE, REGISTERS = 48, 4, 4, 8, 32, 4
RTOL = 1e-5


def close(actual, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=RTOL, atol=RTOL * scale)


def distance(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def block_names(chunk):
    """DINOv2 numbers blocks through all chunks: the third block is the first of chunk 1, blocks.1.2."""
    return [f"blocks.{i // chunk}.{i}." if chunk else f"blocks.{i}." for i in range(DEPTH)]


def backbone(*, chunk=None, registers=0, scales=False, mask_token=False, qkv_bias=True):
    """A state dict in the published layout, with values that all matter."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape, std=1.0, mean=0.0):
        return mean + std * torch.randn(*shape, generator=generator)

    tokens = (SIDE // PATCH) ** 2
    state = {
        "cls_token": random(1, 1, DIM),
        "pos_embed": random(1, 1 + tokens, DIM),
        "patch_embed.proj.weight": random(DIM, 3, PATCH, PATCH, std=0.05),
        "patch_embed.proj.bias": random(DIM, std=0.1),
        "norm.weight": random(DIM, mean=1.0, std=0.3),
        "norm.bias": random(DIM, std=0.3),
    }
    if registers:
        state["register_tokens"] = random(1, registers, DIM)
    if mask_token:
        state["mask_token"] = random(1, DIM)
    for name in block_names(chunk):
        for norm in ("norm1", "norm2"):
            state[f"{name}{norm}.weight"] = random(DIM, mean=1.0, std=0.3)
            state[f"{name}{norm}.bias"] = random(DIM, std=0.3)
        layers = {"attn.qkv": (3 * DIM, DIM), "attn.proj": (DIM, DIM)}
        layers |= {"mlp.fc1": (4 * DIM, DIM), "mlp.fc2": (DIM, 4 * DIM)}
        for layer, (rows, columns) in layers.items():
            state[f"{name}{layer}.weight"] = random(rows, columns, std=1.5 / math.sqrt(columns))
            if layer != "attn.qkv" or qkv_bias:
                state[f"{name}{layer}.bias"] = random(rows, std=0.3)
        if scales:
            state[f"{name}ls1.gamma"] = random(DIM, std=0.5)
            state[f"{name}ls2.gamma"] = random(DIM, std=0.5)
    return state


def published_forward(state, images, chunk=None):
    """All tokens after the last norm: DINO's forward pass, and DINOv2's where there are its parts."""
    patches = conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)
    patches = patches.flatten(2).mT
    cls = state["cls_token"].expand(len(images), -1, -1)
    z = torch.cat([cls, patches], dim=1) + state["pos_embed"]
    if "register_tokens" in state:
        registers = state["register_tokens"].expand(len(images), -1, -1)
        z = torch.cat([z[:, :1], registers, z[:, 1:]], dim=1)

    def norm(z, name):
        return layer_norm(z, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def affine(z, name):
        return linear(z, state[f"{name}.weight"], state.get(f"{name}.bias"))

    for name in block_names(chunk):
        q, k, v = affine(norm(z, f"{name}norm1"), f"{name}attn.qkv").chunk(3, dim=-1)
        heads = []
        for part in range(HEADS):
            one = slice(part * DIM // HEADS, (part + 1) * DIM // HEADS)
            scores = q[..., one] @ k[..., one].mT / math.sqrt(DIM // HEADS)
            heads.append(scores.softmax(-1) @ v[..., one])
        z = z + state.get(f"{name}ls1.gamma", 1.0) * affine(torch.cat(heads, -1), f"{name}attn.proj")
        hidden = gelu(affine(norm(z, f"{name}norm2"), f"{name}mlp.fc1"))
        z = z + state.get(f"{name}ls2.gamma", 1.0) * affine(hidden, f"{name}mlp.fc2")
    return norm(z, "norm")


LAYOUTS = {
    "DINO": {},
    "DINO without qkv bias": {"qkv_bias": False},
    "DINOv2": {"scales": True, "mask_token": True},
    "DINOv2 with registers": {"scales": True, "mask_token": True, "registers": REGISTERS},
    "SimDINOv2": {"chunk": 2, "scales": True, "mask_token": True, "registers": REGISTERS},
    "SimDINOv2 without its mask token": {"chunk": 2, "scales": True, "registers": REGISTERS},
    "registers alone": {"registers": 1},
    "chunks of one": {"chunk": 1, "mask_token": True},
}


@pytest.fixture
def images():
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone.", "_orig_mod.module.backbone."])
def test_equal_to_the_published_forward(layout, prefix, images):
    options = LAYOUTS[layout]
    state = backbone(**options)
    expected = published_forward(state, images, options.get("chunk"))
    wrapped = {prefix + key: value for key, value in state.items()}
    model = from_published(wrapped, num_heads=HEADS).eval()
    assert isinstance(model, timm.models.vision_transformer.VisionTransformer)
    close(model.forward_features(images), expected)
    close(model(images), expected[:, 0])


@torch.no_grad()
def test_every_gradient_arrives(images):
    """In the published names: the split position is the same function of the same numbers."""
    state = backbone(**LAYOUTS["SimDINOv2"])
    leaves = {key: value.clone().requires_grad_() for key, value in state.items()}
    model = from_published(state, num_heads=HEADS)
    with torch.enable_grad():
        published_forward(leaves, images, 2).square().sum().backward()
        model.forward_features(images).square().sum().backward()
    close(model.pos_embed.grad, leaves["pos_embed"].grad[:, 1:])
    close(model.cls_token.grad, leaves["cls_token"].grad)
    close(model.cls_token.grad, leaves["pos_embed"].grad[:, :1])
    close(model.reg_token.grad, leaves["register_tokens"].grad)
    for i, name in enumerate(block_names(2)):
        close(model.blocks[i].ls1.gamma.grad, leaves[f"{name}ls1.gamma"].grad)
        close(model.blocks[i].attn.qkv.weight.grad, leaves[f"{name}attn.qkv.weight"].grad)


@torch.no_grad()
def test_what_goes_wrong_when_it_is_loaded_naively(images):
    """Each of the differences between the layouts, missed alone, gives other features without a word."""
    state = backbone(**LAYOUTS["SimDINOv2"])
    expected = published_forward(state, images, 2)[:, 0]
    right = from_published(state, num_heads=HEADS).eval()
    close(right(images), expected)

    naive = timm.create_model(right.architecture, **{**right.model_args, "init_values": None}).eval()
    naive.load_state_dict({**state, "pos_embed": state["pos_embed"][:, 1:]}, strict=False)
    assert distance(naive(images), expected) > 0.5

    no_class_position = from_published(state, num_heads=HEADS).eval()
    no_class_position.cls_token.copy_(state["cls_token"])
    assert distance(no_class_position(images), expected) > 0.05

    no_scales = from_published(state, num_heads=HEADS).eval()
    for block in no_scales.blocks:
        block.ls1, block.ls2 = nn.Identity(), nn.Identity()
    assert distance(no_scales(images), expected) > 0.05

    no_registers = {key: value for key, value in state.items() if key != "register_tokens"}
    assert distance(from_published(no_registers, num_heads=HEADS).eval()(images), expected) > 0.05

    other_order = {key.replace("blocks.1.3", "blocks.1.x"): value for key, value in state.items()}
    other_order = {key.replace("blocks.1.2", "blocks.1.3"): value for key, value in other_order.items()}
    other_order = {key.replace("blocks.1.x", "blocks.1.2"): value for key, value in other_order.items()}
    assert distance(from_published(other_order, num_heads=HEADS).eval()(images), expected) > 0.05


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_made_again_from_its_own_description(layout, images):
    model = from_published(backbone(**LAYOUTS[layout]), num_heads=HEADS).eval()
    again = create_model(model.architecture, **model.model_args).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images), model(images))
    norms = [module for module in again.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * DEPTH + 1
    assert {norm.eps for norm in norms} == {1e-6}


@pytest.mark.parametrize(
    ("width", "name"), [(192, "tiny"), (384, "small"), (768, "base"), (1024, "large"), (48, "base")]
)
def test_published_widths_and_heads(width, name):
    like = backbone()
    shapes = {key: [width * s // DIM if s % DIM == 0 else s for s in v.shape] for key, v in like.items()}
    shapes["patch_embed.proj.weight"][1:] = [3, 16, 16]
    state = {
        key: torch.zeros(shape)
        for key, shape in shapes.items()
        if not key.startswith(("blocks.1", "blocks.2", "blocks.3"))
    }
    model = from_published(state)
    assert model.architecture == f"vit_{name}_patch16_224"
    assert model.blocks[0].attn.num_heads == max(1, width // 64)
    assert (model.embed_dim, len(model.blocks), model.num_classes) == (width, 1, 0)
    assert model.patch_embed.img_size == (64, 64)


def test_a_classifier_is_kept(images):
    state = {**backbone(), "head.weight": torch.randn(5, DIM), "head.bias": torch.randn(5)}
    model = from_published(state, num_heads=HEADS).eval()
    features = published_forward(state, images)[:, 0]
    close(model(images).detach(), linear(features, state["head.weight"], state["head.bias"]))


# --- what is left out, and what is refused ------------------------------------------------------------------

HEADS_OF_V1 = ["head.mlp.0.weight", "head.mlp.0.bias", "head.mlp.2.weight", "head.last_layer.weight_g"]
HEADS_OF_V2 = ["dino_head.mlp.0.weight", "dino_head.last_layer.weight_v", "ibot_head.mlp.4.bias"]


@pytest.mark.parametrize(
    ("layout", "family", "left"),
    [
        ("DINO", "DINO / SimDINO ViT", HEADS_OF_V1),
        ("SimDINOv2", "DINOv2 / SimDINOv2 ViT", ["backbone.mask_token", *HEADS_OF_V2]),
    ],
)
def test_heads_are_left_out_by_name(layout, family, left, images):
    options = LAYOUTS[layout]
    state = backbone(**options)
    file = {f"backbone.{key}": value for key, value in state.items()}
    file |= {name: torch.ones(3) for name in left if name not in file}
    found = open_published(file, num_heads=HEADS)
    assert found.family == family
    assert sorted(found.ignored) == sorted(left)
    with torch.no_grad():
        close(found.model.eval()(images), published_forward(state, images, options.get("chunk"))[:, 0])
    strange = ["head.mlp.0.something", "dino_head.other.weight", "decoder.weight"]
    with pytest.raises(
        CheckpointError, match=r"unexpected \(3\): decoder.weight, dino_head.other.weight, head"
    ):
        from_published({**file, **{name: torch.ones(3) for name in strange}}, num_heads=HEADS)


def test_all_that_does_not_fit_is_listed_at_once():
    state = backbone(**LAYOUTS["SimDINOv2"])
    del state["blocks.1.2.norm2.bias"]
    state["blocks.1.3.ls1.gamma"] = torch.ones(7)
    state["blocks.0.0.attn.qkv.weight"] = state["blocks.0.0.attn.qkv.weight"].long()
    state["blocks.0.0.extra"] = torch.ones(1)
    with pytest.raises(CheckpointError) as error:
        from_published(state, num_heads=HEADS)
    message = str(error.value)
    assert "missing (1): blocks.2.norm2.bias" in message
    assert "unexpected (1): blocks.0.extra" in message
    assert "wrong shape (1): blocks.3.ls1.gamma is (7,), expected (48,)" in message
    assert "wrong type (1): blocks.0.attn.qkv.weight is int64" in message


def refused(state, message, error=CheckpointError, **hints):
    with pytest.raises(error, match=message) as caught:
        from_published(state, **{"num_heads": HEADS, **hints})
    assert len(str(caught.value).splitlines()) <= 5


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["visual.transformer.resblocks.0.attn.in_proj_weight"], "CLIPA.*outputs were never verified"),
        (
            ["transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.weight"],
            "a language model.*only CRATE's",
        ),
        (
            ["_orig_mod.transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.temp"],
            "a language model.*only CRATE's",
        ),
        (
            ["layer1.0.conv1.weight", "fc.bias"],
            r"\(first keys: layer1.0.conv1.weight, fc.bias\) - known: CRATE, .*DINO / SimDINO ViT",
        ),
        ([], r"first keys: none"),
    ],
)
def test_layouts_that_do_not_load(keys, message):
    refused(dict.fromkeys(keys, ONE), message)


def test_values_that_cannot_be():
    state = backbone()
    refused({**state, "norm.bias": torch.full((DIM,), torch.nan)}, "NaN or infinity in 1 tensors: norm.bias")
    refused(
        {"state_dict": state, "epoch": 3}, "not all of it are tensors: state_dict, epoch - give the state"
    )
    refused({**state, "module.norm.bias": ONE}, "two keys of the file mean the same: norm.bias")
    refused({**state, "blocks.999999999.norm1.weight": ONE}, "there is a layer 999999999 among 5")
    positions = torch.zeros(1, 1 + 15, DIM)
    refused(
        {**state, "pos_embed": positions}, r"positions for 15 patches, which is not a square - give img_size"
    )
    refused({**state, "patch_embed.proj.weight": torch.zeros(DIM, 3, 0, 0)}, "DINO .*, but not its shapes")
    refused({**state, "patch_embed.proj.weight": torch.zeros(DIM)}, "DINO .*, but not its shapes")
    refused({**state, "pos_embed": torch.zeros(())}, "DINO .*, but not its shapes")


def test_sizes_that_only_one_tensor_claims_cost_nothing():
    """A width of two million would be 48 TB of weights; the other tensors do not have it."""
    state = {**backbone(), "patch_embed.proj.weight": torch.zeros(2_000_000, 1, 1, 1)}
    refused(state, "do not fit the model")


@torch.no_grad()
def test_hints(images):
    state = backbone()
    wide = {**state, "pos_embed": torch.cat([state["pos_embed"], state["pos_embed"][:, 1:9]], dim=1)}
    model = from_published(wide, num_heads=HEADS, img_size=(32, 48)).eval()
    images = torch.cat([images, images[..., :16]], dim=-1)
    close(model.forward_features(images), published_forward(wide, images))
    assert model.model_args["img_size"] == (32, 48)
    other = from_published(state, num_heads=2).eval()
    assert distance(other(images[..., :32]), published_forward(state, images[..., :32])[:, 0]) > 0.01
    refused(state, "unexpected keyword|num_head", ConfigError, num_head=4)
    refused(state, "checkpoint_path: not a size of the model", ConfigError, checkpoint_path="a.pth")
    refused(state, "divisible|should be", ConfigError, num_heads=5)


def test_from_a_file_as_it_is_published(images, tmp_path):
    """The documented pair, on SimDINO's layout of a training state."""
    state = backbone(**LAYOUTS["SimDINOv2"])
    student = {f"module.backbone.{key}": value + 1 for key, value in state.items()}
    teacher = {f"backbone.{key}": value for key, value in state.items()}
    path = tmp_path / "checkpoint.pth"
    torch.save({"student": student, "teacher": teacher, "epoch": 99}, path)  # noqa: TID251
    with pytest.warns(UserWarning, match="took 'teacher'; key= takes another: student"):
        model = from_published(read_published(path), num_heads=HEADS).eval()
    with torch.no_grad():
        close(model(images), published_forward(state, images, 2)[:, 0])
    other = read_published(path, key="student")
    assert torch.equal(other["module.backbone.norm.bias"], state["norm.bias"] + 1)
