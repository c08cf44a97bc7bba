"""Black boxes: a ViT's block to the last bit, under the same loop, and honest about stating nothing."""

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from pellucid.steps import ISTA, MHSA, MLP, BlackBox, unroll

both = pytest.mark.parametrize(
    "cls", [lambda **kw: MHSA(8, 2, **kw), lambda **kw: MLP(8, **kw)], ids=["MHSA", "MLP"]
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def timms(block):
    """A timm block as two steps that hold its very parameters."""
    scale = None if isinstance(block.ls1, nn.Identity) else 1.0
    attention = MHSA(
        block.norm1.normalized_shape[0], block.attn.num_heads, norm=block.norm1, layer_scale=scale
    )
    attention.qkv, attention.output = block.attn.qkv, block.attn.proj
    mlp = MLP(block.norm2.normalized_shape[0], norm=block.norm2, layer_scale=scale)
    mlp.fc1, mlp.fc2 = block.mlp.fc1, block.mlp.fc2
    if scale is not None:
        attention.layer_scale, mlp.layer_scale = block.ls1.gamma, block.ls2.gamma
    return nn.ModuleDict({"attention": attention, "mlp": mlp})


@pytest.mark.parametrize("init_values", [None, 0.3])
def test_the_two_are_a_block_of_a_vit_in_output_and_gradients(init_values):
    block = Block(12, 3, qkv_bias=True, init_values=init_values).double()
    with torch.no_grad():
        for seed, parameter in enumerate(block.parameters()):
            parameter.add_(0.3 * normal(*parameter.shape, seed=seed))
    layer, gradients = timms(block), []
    assert len(list(layer.parameters())) == len(list(block.parameters()))
    for forward in (block, lambda z: unroll([layer], z)):
        z = normal(2, 7, 12).requires_grad_()
        out = forward(z)
        gradients.append([out, *torch.autograd.grad(out.pow(2).sum(), [z, *block.parameters()])])
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_attention_shown_is_the_attention_used():
    step, z = MHSA(8, 2, norm=nn.LayerNorm(8)).double(), 2 * normal(3, 7, 8)
    with torch.no_grad():
        step.qkv.weight.mul_(30)
    weights = step.attention(z)
    assert weights.shape == (3, 2, 7, 7)
    assert weights.std() > 0.05  # far from uniform
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 7, dtype=torch.float64))
    value = step.heads(step.norm(z))[2]
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(step(z), z + step.output(mixed), rtol=1e-10, atol=1e-12)


@both
def test_they_begin_as_a_vit_does_and_near_the_identity(cls):
    torch.manual_seed(0)
    step = cls()
    for linear in (module for module in step.modules() if isinstance(module, nn.Linear)):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.3)
        assert linear.weight.abs().max() < 0.1
        assert not linear.bias.any()
    z = normal(2, 5, 8, dtype=torch.float32)
    assert 0 < (step(z) - z).norm() < 0.05 * z.norm()


@both
def test_layer_scale_is_a_factor_for_each_coordinate(cls):
    step, plain, z = cls(layer_scale=0.25).double(), cls().double(), normal(2, 5, 8)
    assert plain.layer_scale is None
    plain.load_state_dict({name: p for name, p in step.state_dict().items() if name != "layer_scale"})
    torch.testing.assert_close(step(z) - z, 0.25 * (plain(z) - z))
    with torch.no_grad():
        step.layer_scale.copy_(torch.arange(8))
    torch.testing.assert_close(step(z) - z, torch.arange(8) * (plain(z) - z))


@both
def test_the_norm_stands_in_front_of_the_branch_and_not_of_the_residual(cls):
    norm = nn.LayerNorm(8).double()
    step, z = cls(norm=norm).double(), normal(2, 5, 8)
    torch.testing.assert_close(step(z) - z, step.branch(norm(z)))
    torch.testing.assert_close(step(7 * z) - 7 * z, step(z) - z, rtol=1e-3, atol=1e-6)  # scales do not pass


def test_an_mlp_sees_one_token_at_a_time_and_attention_does_not():
    z = normal(1, 5, 8)
    other = z.clone()
    other[:, 3:] += 1
    mlp, attention = MLP(8).double(), MHSA(8, 2).double()
    assert torch.equal(mlp(z)[:, :3], mlp(other)[:, :3])
    assert not torch.allclose(attention(z)[:, :3], attention(other)[:, :3], rtol=0, atol=1e-9)


def test_black_and_white_boxes_share_one_loop():
    seen, z = [], normal(2, 5, 8, dtype=torch.float32)
    layer = {"attend": MHSA(8, 2), "sparsify": ISTA(8), "mlp": MLP(8, ratio=2.0)}
    out = unroll([layer], z, on_step=seen.append)
    assert [record.name for record in seen] == ["attend", "sparsify", "mlp"]
    assert [record.step.objective_name for record in seen] == [None, "LASSO", None]
    assert torch.equal(out, layer["mlp"](layer["sparsify"](layer["attend"](z))))


def test_a_black_box_must_say_where_it_moves():
    class Silent(BlackBox):
        pass

    with pytest.raises(TypeError, match="branch"):
        Silent(8)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="dim 8 is not divisible by num_heads 3"):
        MHSA(8, 3)
