"""Attention maps against the attention that the models really use."""

import pytest
import timm
import torch

from pellucid.measure import attention_maps
from pellucid.models import CRATE, create_model
from pellucid.steps import MSSA


def test_crate_maps_are_the_class_tokens_rows():
    model = CRATE(8, 2, 1, 10, embed_dim=32, depth=2, num_heads=4, reg_tokens=1).eval()
    images = torch.randn(3, 1, 8, 8)
    maps = attention_maps(model, images)
    records = []
    with torch.no_grad():
        model.forward_features(images, records.append)
    for record in records:
        if isinstance(record.step, MSSA):
            w = record.step.project(record.z)
            weights = (w @ w.mT / 8**0.5).softmax(-1)
            torch.testing.assert_close(maps[record.layer], weights[:, :, 0, 2:].detach())
    assert maps[1].shape == (3, 4, 16)
    assert (maps[1].sum(-1) <= 1).all()


def test_without_a_class_token_it_is_the_mean_reader():
    model = CRATE(8, 2, 1, 10, embed_dim=32, depth=1, num_heads=4, class_token=False, global_pool="avg")
    maps = attention_maps(model, torch.randn(2, 1, 8, 8))
    torch.testing.assert_close(maps[1].sum(-1), torch.ones(2, 4))


def test_registers_alone_are_no_class_token():
    options = {"class_token": False, "reg_tokens": 2, "global_pool": "avg"}
    model = CRATE(8, 2, 1, 10, embed_dim=32, depth=1, num_heads=4, **options).eval()
    vit = create_model("vit_digits", **options, depth=1).eval()
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        step, z = model.layers[0]["compress"], model.embed(images)
        weights = step.attention(z)
        torch.testing.assert_close(attention_maps(model, images)[1], weights.mean(-2)[..., 2:])
        z = vit._pos_embed(vit.patch_embed(images))
        block = vit.blocks[0]
        q, k, _ = block.attn.qkv(block.norm1(z)).reshape(2, 18, 3, 4, 16).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 4).softmax(-1)
    torch.testing.assert_close(attention_maps(vit, images)[1], weights.mean(-2)[..., 2:])


def test_exact_compression_has_no_attention():
    model = CRATE(8, 2, 1, 10, embed_dim=32, depth=1, num_heads=4, compression="exact")
    assert attention_maps(model, torch.randn(2, 1, 8, 8)) == {}


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 3}, {"qk_norm": True}])
def test_vit_maps_are_those_that_its_unfused_attention_forms(options):
    model = create_model("vit_digits", **options).eval()
    images, seen = torch.randn(2, 1, 8, 8), []
    maps = attention_maps(model, images)
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(images)
    assert len(seen) == len(model.blocks) == len(maps)
    prefix = 1 + options.get("reg_tokens", 0)
    for layer, weights in enumerate(seen, start=1):
        torch.testing.assert_close(maps[layer], weights[:, :, 0, prefix:])
        assert (maps[layer].sum(-1) <= 1 + 1e-6).all()


@pytest.mark.parametrize("name", ["crate_digits", "vit_digits"])
def test_the_model_is_left_as_it_was(name):
    model = create_model(name).train()
    model.norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images, state = torch.randn(2, 1, 8, 8), torch.get_rng_state()
    attention_maps(model, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "test_vit_relpos", "test_resnet"])
def test_an_attention_of_another_kind_is_left_out_and_not_guessed(name):
    model = timm.create_model(name, pretrained=False)
    channels, height, width = model.pretrained_cfg["input_size"]
    assert attention_maps(model, torch.randn(1, channels, height, width)) == {}
