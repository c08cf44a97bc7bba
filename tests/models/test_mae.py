"""CRATE-MAE beyond what was recorded: the corrected form, masks, and what the decoder undoes."""

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from pellucid.models import CRATE, CRATEMAE, create_model
from pellucid.steps import MHSA, MLP, Decompression, Synthesis

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}


@pytest.fixture(params=["visible", "all"])
def encode(request):
    return request.param


@pytest.fixture
def model(encode):
    return CRATEMAE(encode=encode, stem="conv", compression="untied", **SIZES).eval()


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_the_mask_hides_the_largest_noise_and_as_many_in_every_image(model):
    noise = torch.rand(5, 16)
    mask = model.random_mask(5, 0.75, noise)
    assert mask.sum(-1).tolist() == [12] * 5
    for row, hidden in zip(noise, mask, strict=True):
        assert row[hidden].min() > row[~hidden].max()
    assert not torch.equal(model.random_mask(5), model.random_mask(5))


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.99])
def test_a_mask_of_nothing_or_everything_is_refused(model, ratio):
    with pytest.raises(ValueError, match=f"a mask ratio of {ratio} leaves"):
        model.random_mask(1, ratio)


def test_hidden_patches_change_nothing_that_is_computed(model, images):
    mask = model.random_mask(3)
    pixels = model.unpatchify(mask.unsqueeze(-1).expand(-1, -1, 48).float()).bool()
    other = torch.where(pixels, torch.rand_like(images), images)
    assert torch.equal(model.reconstruct(images, mask), model.reconstruct(other, mask))
    seen = torch.where(pixels, images, torch.rand_like(images))
    assert not torch.allclose(model.reconstruct(images, mask), model.reconstruct(seen, mask))


def test_only_the_published_encoder_sees_tokens_for_hidden_patches(model, images, encode):
    tokens = model.encode_masked(images, model.random_mask(3))
    assert tokens.shape == (3, 1 + (4 if encode == "visible" else 16), 24)
    assert model.reconstruct(images, model.random_mask(3)).shape == (3, 16, 48)


def test_visible_patches_keep_their_place():
    """A patch that is seen comes back where it stood: the decoder of one image equals that of its parts."""
    model = CRATEMAE(stem="conv", **{**SIZES, "depth": 1}).eval()
    mask = torch.ones(1, 16, dtype=torch.bool)
    mask[0, [2, 9, 11]] = False
    encoded = torch.arange(1.0, 1 + 4 * 24).reshape(1, 4, 24)
    with torch.no_grad():
        model.decoder_pos_embed.zero_()
        tokens = model._insert_mask_tokens(encoded, mask)
    assert torch.equal(tokens[0, [0, 3, 10, 12]], encoded[0])
    rest = [i for i in range(17) if i not in (0, 3, 10, 12)]
    assert torch.equal(tokens[0, rest], model.mask_token[0].expand(len(rest), -1))


def test_patches_and_back(model, images):
    patches = model.patchify(images)
    assert patches.shape == (3, 16, 48)
    assert torch.equal(patches[0, 5], images[0, :, 4:8, 4:8].permute(1, 2, 0).flatten())
    assert torch.equal(model.unpatchify(patches), images)


def test_the_loss_is_that_of_hidden_patches(model, images):
    mask = model.random_mask(3)
    error = (model.reconstruct(images, mask) - model.patchify(images)).square().mean(-1)
    expected = torch.stack([row[hidden].mean() for row, hidden in zip(error, mask, strict=True)])
    torch.testing.assert_close(model.masked_loss(images, mask), expected)


def test_normalised_patches(images):
    model = CRATEMAE(norm_pix_loss=True, stem="conv", **SIZES).eval()
    mask = model.random_mask(3)
    torch.testing.assert_close(
        model.masked_loss(images, mask), model.masked_loss(2 * images + 1, mask), rtol=0.2, atol=0
    )
    target = model.patchify(images)
    scaled = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (model.reconstruct(images, mask) - scaled).square().mean(-1)
    torch.testing.assert_close(model.masked_loss(images, mask), (error * mask).sum(-1) / mask.sum(-1))


def test_every_parameter_learns_from_masked_images(model, images):
    """All but the final classifier, which there is none of."""
    model.masked_loss(images, model.random_mask(3)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_learns_to_fill_in(encode):
    torch.manual_seed(0)
    model = CRATEMAE(encode=encode, stem="conv", **SIZES)
    images = torch.rand(8, 1, 1, 1).expand(8, 3, 16, 16).contiguous()  # of one colour each
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model.masked_loss(images, model.random_mask(8)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])


def test_the_decoder_is_the_encoder_in_reverse(model, images):
    """Order and direction: a layer speaks the code, then moves away from the subspaces."""
    records = []
    model.reconstruct(images, model.random_mask(3), on_step=records.append)
    assert [(r.layer, r.name) for r in records] == [
        (1, "compress"), (1, "sparsify"), (2, "compress"), (2, "sparsify"),
        (1, "synthesise"), (1, "decompress"), (2, "synthesise"), (2, "decompress"),
    ]  # fmt: skip
    for record in records[4:]:
        assert type(record.step) is (Synthesis if record.name == "synthesise" else Decompression)
        assert torch.equal(record.step(record.z), record.z_next)


def test_on_whole_images_it_is_its_encoder(model, images):
    encoder = CRATE(stem="conv", compression="untied", **SIZES).eval()
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k in encoder.state_dict()})
    torch.testing.assert_close(model(images), encoder(images))


def test_another_image_size(model):
    model.set_input_size(24)
    images = torch.rand(2, 3, 24, 24)
    assert model.reconstruct(images, model.random_mask(2)).shape == (2, 36, 48)


@pytest.mark.usefixtures("unchecked_shapes")
def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match="encode is 'some'"):
        CRATEMAE(encode="some", **SIZES)
    with pytest.raises(ValueError, match="decoder is 'none'; known: 'reverse', 'mhsa_mlp'"):
        CRATEMAE(decoder="none", **SIZES)
    with pytest.raises(ValueError, match="no use for registers"):
        CRATEMAE(reg_tokens=2, **SIZES)


def test_gradient_checkpointing_recomputes_the_decoder_too(model, images):
    mask = model.random_mask(3)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.masked_loss(images, mask).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_registered_with_a_head_on_request():
    assert create_model("crate_mae_digits", img_size=8).num_classes == 0
    assert create_model("crate_mae_digits", num_classes=3)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


# --- the ordinary masked autoencoder --------------------------------------------------------------------


def vit_block(layer, dim, num_heads):
    """timm's block with the weights of one of ours."""
    attention, mlp = layer["compress"], layer["sparsify"]
    block = Block(dim, num_heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-5))
    for ours, theirs in (
        (attention.norm, block.norm1),
        (attention.qkv, block.attn.qkv),
        (attention.output, block.attn.proj),
        (mlp.norm, block.norm2),
        (mlp.fc1, block.mlp.fc1),
        (mlp.fc2, block.mlp.fc2),
    ):
        theirs.load_state_dict(ours.state_dict())
    return block.eval()


def test_the_ordinary_one_is_a_vit_on_both_sides():
    """Patches left out, blocks, mask tokens put in with positions of the decoder, blocks: written out."""
    model = create_model("vit_mae_digits").eval()
    assert {type(m) for layer in (*model.layers, *model.decoder_layers) for m in layer.values()} == {
        MHSA,
        MLP,
    }
    images, mask = torch.rand(3, 1, 8, 8), model.random_mask(3)
    tokens = model.embed.stem.proj(images).flatten(2).mT + model.embed.pos_embed[:, 1:]
    expected = []
    with torch.no_grad():
        for picture, hidden in zip(tokens, mask, strict=True):
            z = torch.cat([model.embed.class_token[0] + model.embed.pos_embed[:, 0], picture[~hidden]])[None]
            for layer in model.layers:
                z = vit_block(layer, 64, 4)(z)
            z = model.decoder_embed(model.norm(z))
            whole = model.mask_token.repeat(1, 17, 1)
            whole[:, 0], whole[0, 1:][~hidden] = z[:, 0], z[0, 1:]
            z = whole + model.decoder_pos_embed
            for layer in model.decoder_layers:
                z = vit_block(layer, 64, 4)(z)
            expected.append(model.decoder_head(model.decoder_norm(z))[:, 1:])
        torch.testing.assert_close(model.reconstruct(images, mask), torch.cat(expected))


def test_the_ordinary_one_has_the_sizes_of_the_model_it_stands_beside():
    for size in ("digits", "micro_patch4_32", "tiny_patch16_224"):
        with torch.device("meta"):
            ours, ordinary = create_model(f"crate_mae_{size}"), create_model(f"vit_mae_{size}")
        for name in ("embed_dim", "num_features", "global_pool"):
            assert getattr(ours, name) == getattr(ordinary, name)
        assert ours.embed.grid_size == ordinary.embed.grid_size
        assert len(ours.layers) == len(ordinary.layers) == len(ordinary.decoder_layers)
