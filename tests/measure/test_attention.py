"""Attention maps against the attention that the models really use."""

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


def test_exact_compression_has_no_attention():
    model = CRATE(8, 2, 1, 10, embed_dim=32, depth=1, num_heads=4, compression="exact")
    assert attention_maps(model, torch.randn(2, 1, 8, 8)) == {}


def test_vit_maps_are_those_that_its_unfused_attention_forms():
    model = create_model("vit_digits").eval()
    images, seen = torch.randn(2, 1, 8, 8), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out))
    maps = attention_maps(model, images)
    assert len(seen) == len(model.blocks) == len(maps)
    for layer, weights in enumerate(seen, start=1):
        torch.testing.assert_close(maps[layer], weights[:, :, 0, 1:].detach())
