"""The cache against the equations of the layers: what it holds must add up to what the layers do."""

import pytest
import timm
import torch

from pellucid.errors import ConfigError
from pellucid.measure import run_with_cache
from pellucid.models import create_model
from pellucid.steps import MSSA

STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")


def made(name, **options):
    return create_model(name, num_classes=3, **options).eval(), torch.randn(2, 1, 8, 8)


def of_layer(cache, layer):
    """The cache of one layer, by what comes behind ``blocks.{l}.``."""
    start = f"blocks.{layer}."
    return {key.removeprefix(start): value for key, value in cache.items() if key.startswith(start)}


@pytest.mark.parametrize("name", ["crate_digits", "crate_alpha_digits", "mhsa_mlp_digits", "vit_digits"])
def test_the_output_is_the_models_and_the_stream_has_no_gap(name):
    model, images = made(name)
    output, cache = run_with_cache(model, images)
    with torch.no_grad():
        assert torch.equal(output, model(images))
        features = model.norm(cache["blocks.3.hook_resid_post"])
        assert torch.equal(features, model.forward_features(images))
        maps = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    for layer, patches in enumerate(maps):
        assert torch.equal(cache[f"blocks.{layer}.hook_resid_post"][:, 1:], patches)
    for layer in range(3):
        assert torch.equal(
            cache[f"blocks.{layer}.hook_resid_post"], cache[f"blocks.{layer + 1}.hook_resid_pre"]
        )
    assert not any(value.requires_grad for value in cache.values())


def test_crate_moves_by_its_pattern_and_ends_at_its_code():
    model, images = made("crate_digits", depth=2, compress_step_size=0.7)
    _, cache = run_with_cache(model, images)
    with torch.no_grad():
        assert torch.equal(cache["blocks.0.hook_resid_pre"], model.embed(images))
        for index, layer in enumerate(model.layers):
            seen, (compress, sparsify) = of_layer(cache, index), layer.values()
            q, pattern = seen["attn.hook_q"], seen["attn.hook_pattern"]
            assert (q.shape, pattern.shape) == ((2, 17, 8, 8), (2, 8, 17, 17))
            torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 8, 17))
            moved = torch.einsum("bkij,bjkp,kdp->bid", pattern, q, compress.U)
            torch.testing.assert_close(seen["hook_resid_mid"], seen["hook_resid_pre"] + 0.7 * moved)
            for k in range(8):
                torch.testing.assert_close(
                    q[:, :, k], compress.norm(seen["hook_resid_pre"]) @ compress.U[k], rtol=1e-4, atol=1e-5
                )
            code = sparsify(sparsify.enter(seen["hook_resid_mid"]))
            torch.testing.assert_close(seen["mlp.hook_post"], code)
            assert torch.equal(seen["mlp.hook_post"], seen["hook_resid_post"])
            assert 0.1 < (code == 0).float().mean() < 1


def test_in_crate_alpha_the_code_is_not_the_token():
    model, images = made("crate_alpha_digits", depth=1)
    _, cache = run_with_cache(model, images)
    seen = of_layer(cache, 0)
    code = seen["mlp.hook_post"]
    assert code.shape == (2, 17, 256)
    assert (code >= 0).all()
    assert (code > 0).any()
    spoken = code @ model.layers[0]["sparsify"].output.mT
    torch.testing.assert_close(seen["hook_resid_post"], seen["hook_resid_mid"] + spoken)


def test_a_timm_vit_moves_by_its_pattern_and_its_neurons():
    model, images = made("vit_digits", qk_norm=True)
    _, cache = run_with_cache(model, images)
    with torch.no_grad():
        for index, block in enumerate(model.blocks):
            seen = of_layer(cache, index)
            q, k, v = (seen[f"attn.hook_{name}"] for name in "qkv")
            assert q.shape == k.shape == v.shape == (2, 17, 4, 16)
            weights = (torch.einsum("bikp,bjkp->bkij", q, k) / 4).softmax(-1)
            torch.testing.assert_close(seen["attn.hook_pattern"], weights)
            mixed = torch.einsum("bkij,bjkp->bikp", weights, v).flatten(-2)
            torch.testing.assert_close(
                seen["hook_resid_mid"], seen["hook_resid_pre"] + block.attn.proj(mixed), rtol=1e-4, atol=1e-5
            )
            assert seen["mlp.hook_post"].shape == (2, 17, 256)
            torch.testing.assert_close(
                seen["hook_resid_post"], seen["hook_resid_mid"] + block.mlp.fc2(seen["mlp.hook_post"])
            )


def test_a_black_box_of_steps_moves_by_its_pattern_and_its_neurons():
    model, images = made("mhsa_mlp_digits", depth=1)
    _, cache = run_with_cache(model, images)
    seen, (attend, mlp) = of_layer(cache, 0), model.layers[0].values()
    q, k, v = (seen[f"attn.hook_{name}"] for name in "qkv")
    weights = (torch.einsum("bikp,bjkp->bkij", q, k) / 8**0.5).softmax(-1)
    torch.testing.assert_close(seen["attn.hook_pattern"], weights)
    mixed = torch.einsum("bkij,bjkp->bikp", weights, v).flatten(-2)
    torch.testing.assert_close(seen["hook_resid_mid"], seen["hook_resid_pre"] + attend.output(mixed))
    torch.testing.assert_close(
        seen["hook_resid_post"], seen["hook_resid_mid"] + mlp.fc2(seen["mlp.hook_post"])
    )


@pytest.mark.parametrize(
    ("name", "options", "missing"),
    [
        ("crate_digits", {"compression": "exact"}, {"attn.hook_pattern"}),
        ("tost_digits", {}, {"attn.hook_pattern"}),
    ],
)
def test_what_a_layer_does_not_form_is_absent(name, options, missing):
    model, images = made(name, **options)
    _, cache = run_with_cache(model, images)
    every = {*STREAM, "attn.hook_q", "attn.hook_pattern", "mlp.hook_post"}
    for layer in range(4):
        assert set(of_layer(cache, layer)) == every - missing


def test_an_attention_of_another_kind_is_not_guessed():
    model = timm.create_model("eva02_tiny_patch14_224", pretrained=False)
    _, cache = run_with_cache(model, torch.randn(1, 3, 224, 224))
    assert {*STREAM} <= {*of_layer(cache, 0)}
    assert not [key for key in cache if "attn" in key or "mlp" in key]


@pytest.mark.parametrize("name", ["crate_digits", "vit_digits"])
def test_a_filter_selects(name):
    model, images = made(name)
    full = run_with_cache(model, images)[1]
    one, several = "blocks.2.hook_resid_mid", ["blocks.0.attn.hook_pattern", "blocks.3.mlp.hook_post"]
    wanted = {
        one: [one],
        tuple(several): several,
        frozenset(several): several,
        (): [],
    }
    for given, keys in wanted.items():
        cache = run_with_cache(model, images, given)[1]
        assert sorted(cache) == sorted(keys)
    patterns = run_with_cache(model, images, lambda key: key.endswith("pattern"))[1]
    assert list(patterns) == [f"blocks.{layer}.attn.hook_pattern" for layer in range(4)]
    assert all(torch.equal(value, full[key]) for key, value in patterns.items())
    assert run_with_cache(model, images, lambda key: False)[1] == {}


def test_weights_are_formed_only_where_they_are_asked_for(monkeypatch):
    model, images = made("crate_digits")
    formed, attention = [], MSSA.attention
    monkeypatch.setattr(MSSA, "attention", lambda step, z: formed.append(step) or attention(step, z))
    run_with_cache(model, images, lambda key: "pattern" not in key)
    assert formed == []
    run_with_cache(model, images, "blocks.1.attn.hook_pattern")
    assert formed == [model.layers[1]["compress"]]
    run_with_cache(model, images)
    assert len(formed) == 1 + 4


def test_layers_come_in_order():
    model, images = made("crate_digits", depth=2)
    parts = ["hook_resid_pre", "attn.hook_q", "attn.hook_pattern", "hook_resid_mid", "mlp.hook_post"]
    parts.append("hook_resid_post")
    expected = [f"blocks.{layer}.{part}" for layer in (0, 1) for part in parts]
    assert list(run_with_cache(model, images)[1]) == expected


@pytest.mark.parametrize("name", ["crate_digits", "vit_digits"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "blocks.1.attn.hook_patern",
            "no activation .* 'blocks.1.attn.hook_patern' - did you mean 'blocks.1",
        ),
        (
            "blocks.4.hook_resid_post",
            "'blocks.4.hook_resid_post' - did you mean 'blocks.[0-3].hook_resid_post'",
        ),
        (["blocks.0.hook_resid_post", "zzz"], "'zzz' - known: blocks.0.attn.hook_.*, blocks.0.mlp.hook_post"),
    ],
)
def test_a_name_that_does_not_exist(name, given, message):
    model, images = made(name)
    with pytest.raises(ConfigError, match=message) as error:
        run_with_cache(model, images, given)
    assert len(str(error.value)) < 400


def test_a_model_without_tokens():
    model = timm.create_model("test_resnet", pretrained=False)
    with pytest.raises(ConfigError, match="cannot look inside ResNet"):
        run_with_cache(model, torch.randn(1, 3, 160, 160))


@pytest.mark.parametrize("name", ["crate_alpha_digits", "vit_digits"])
@pytest.mark.parametrize("names_filter", [None, "no such name"])
def test_the_model_is_left_as_it_was(name, names_filter):
    model, images = made(name)
    model.train()
    model.norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if names_filter is None:
        run_with_cache(model, images)
    else:
        with pytest.raises(ConfigError):
            run_with_cache(model, images, names_filter)
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
