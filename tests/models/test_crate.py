"""CRATE: its size, its patches, its steps, and what it says to wrong options."""

import pytest
import timm
import torch
from torch.nn import functional as F

from pellucid.errors import ConfigError
from pellucid.models import CRATE, create_model, list_models
from pellucid.models.embed import LinearStem, TokenEmbedding
from pellucid.steps import ISTA, MSSA, ExactCompression, UntiedMSSA

PUBLISHED_MILLIONS = {"tiny": 6.09, "small": 13.12, "base": 22.80, "large": 77.64}


def digits(**options):
    return create_model("crate_digits", **options)


@pytest.mark.parametrize(("size", "millions"), PUBLISHED_MILLIONS.items())
def test_as_many_parameters_as_published(size, millions):
    with torch.device("meta"):
        model = create_model(f"crate_{size}_patch16_224")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_tied_layers_have_two_matrices():
    layer = digits().layers[0]
    matrices = [p for p in layer.parameters() if p.dim() == 2]
    assert [tuple(m.shape) for m in matrices] == [(64, 64)] * 2


def test_parts_are_what_the_options_say():
    for compression, cls in {"tied": MSSA, "untied": UntiedMSSA, "exact": ExactCompression}.items():
        model = digits(
            compression=compression, compress_step_size=0.5, step_size=0.2, sparsity=0.3, eps=0.7, num_heads=8
        )
        assert len(model.layers) == 4
        for layer in model.layers:
            assert list(layer) == ["compress", "sparsify"]
            compress, sparsify = layer.values()
            assert type(compress) is cls
            assert type(sparsify) is ISTA
            assert (compress.step_size, compress.eps, compress.num_heads) == (0.5, 0.7, 8)
            assert (sparsify.step_size, sparsify.sparsity) == (0.2, 0.3)


def test_layers_do_as_their_equations_say():
    model = digits(depth=1, num_heads=4, step_size=0.1, sparsity=0.1).eval().double()
    x = torch.rand(2, 1, 8, 8).double()
    layer = model.layers[0]
    with torch.no_grad():
        z = model.embed(x)
        half = z + sum(
            torch.softmax(w @ w.mT / 4, -1) @ w @ U.T
            for U in layer["compress"].U
            for w in [layer["compress"].norm(z) @ U]
        )
        u, D = layer["sparsify"].enter(half), layer["sparsify"].dictionary
        out = torch.relu(u + 0.1 * (u - u @ D.T) @ D - 0.01)
        expected = model.head(model.norm(out)[:, 0])
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


def test_stem_flattens_patches_row_by_row_with_the_channel_last():
    stem = LinearStem((2, 3), 2, 12)
    stem.norm_in = stem.norm_out = torch.nn.Identity()
    with torch.no_grad():
        stem.proj.weight.copy_(torch.eye(12))
        stem.proj.bias.zero_()
    images = torch.arange(2 * 2 * 4 * 6).float().view(2, 2, 4, 6)
    tokens = stem(images)
    for i, (row, column) in enumerate([(0, 0), (0, 3), (2, 0), (2, 3)]):
        patch = images[:, :, row : row + 2, column : column + 3]
        torch.testing.assert_close(tokens[:, i], patch.permute(0, 2, 3, 1).flatten(1))


def test_prefix_is_class_then_registers_and_registers_have_no_position():
    embed = TokenEmbedding(8, 4, 1, 6, reg_tokens=2)
    tokens = embed(torch.zeros(3, 1, 8, 8))
    assert embed.num_prefix_tokens == 3
    assert tokens.shape == (3, 3 + 4, 6)
    for row in tokens:
        torch.testing.assert_close(row[0], (embed.class_token + embed.pos_embed[:, :1])[0, 0])
        torch.testing.assert_close(row[1:3], embed.reg_tokens[0])


def test_both_stems_see_the_same_patch_order():
    images = torch.zeros(1, 1, 8, 8)
    images[0, 0, 4:, :4] = 5.0  # third patch of four, row by row
    for stem in ("linear", "conv"):
        embed = TokenEmbedding(8, 4, 1, 6, stem=stem, class_token=False)
        with torch.no_grad():
            if stem == "linear":
                embed.stem.norm_in = torch.nn.Identity()
            change = (embed(images) - embed(torch.zeros_like(images))).abs().sum(-1)[0]
        assert change.argmax() == 2
        assert (change > 1e-6).sum() == 1


def test_fresh_bases_and_dictionaries_are_orthogonal_and_published_ones_are_not():
    for init, orthogonal in (("orthogonal", True), ("published", False)):
        model = digits(init=init, pos_std=0.02)
        for layer in model.layers:
            for matrix in (layer["compress"].subspaces.weight, layer["sparsify"].dictionary):
                assert torch.allclose(matrix @ matrix.T, torch.eye(64), atol=1e-5) == orthogonal
        assert (model.embed.pos_embed.std() > 0.5) == (not orthogonal)


def test_watching_a_forward_pass_changes_nothing():
    model, x, seen = digits().eval(), torch.randn(2, 1, 8, 8), []
    with torch.no_grad():
        watched = model(x, on_step=seen.append)
        assert torch.equal(watched, model(x))
    assert [(r.layer, r.name) for r in seen] == [
        (i, n) for i in (1, 2, 3, 4) for n in ("compress", "sparsify")
    ]
    sparse = [(r.z_next == 0).float().mean() for r in seen if r.name == "sparsify"]
    assert min(sparse) > 0.1
    assert torch.equal(model.forward_features(x, seen.append)[:, 0], model.norm(seen[-1].z_next)[:, 0])


@pytest.mark.parametrize("name", ["crate_digits", "crate_micro_patch4_32", "crate_tiny_patch16_224"])
@pytest.mark.parametrize("compression", ["tied", "untied", "exact", "mhsa"])
@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_every_choice_of_parts_trains(name, compression, stem):
    side = 2 * {"digits": 2, "micro": 4, "tiny": 16}[name.split("_")[1]]
    options = {"img_size": side, "depth": 2, "num_classes": 3, "init": "published"}
    model = create_model(name, compression=compression, stem=stem, **options)
    model(torch.randn(2, 1 if name == "crate_digits" else 3, side, side)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    free = any("output" in key for key, _ in model.named_parameters())
    assert free == (compression in ("untied", "mhsa"))


def test_learns_a_planted_difference():
    """Left-lit against right-lit pictures, in sixty steps."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 8, 8, generator=generator)
    y = torch.arange(64) % 2
    x[y == 0, :, :, :4] += 1.5
    x[y == 1, :, :, 4:] += 1.5
    model = digits(num_classes=2, depth=2, global_pool="avg")
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.95


# --- what it says to wrong options ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("crate_tinny_patch16_224", {}, r"unknown model 'crate_tinny.*did you mean 'crate_tiny_patch16_224'"),
        ("zzz", {}, "unknown model 'zzz' - known: .*crate_digits"),
        (
            "crate_digits",
            {"depht": 3},
            "unknown model option 'depht' for crate_digits - did you mean 'depth'",
        ),
        ("vit_digits", {"depht": 3}, "unknown model option 'depht' for vit_digits - did you mean 'depth'"),
        ("crate_digits", {"qqq": 3}, "unknown model option 'qqq' for crate_digits - known: .*embed_dim"),
        ("crate_digits", {"num_heads": 5}, "64 is not divisible by num_heads 5"),
        ("crate_digits", {"img_size": 9}, "9 / 2 is not whole; nearest sizes 8 or 10"),
        ("crate_digits", {"img_size": 1}, "an image side of 1 is smaller than a patch of 2"),
        ("crate_digits", {"pretrained": True}, "no published weights for crate_digits yet"),
        ("crate_digits", {"class_token": False}, "needs class_token=True - or take global_pool='avg'"),
        ("vit_tiny_patch16_224", {"no_such_thing": 1}, "vit_tiny_patch16_224: .*no_such_thing"),
    ],
)
def test_wrong_names_and_sizes_are_refused_with_the_remedy(name, options, message):
    with pytest.raises(ConfigError, match=message):
        create_model(name, **options)


@pytest.mark.usefixtures("unchecked_shapes")  # users run without the checks: the message must come from us
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": "tide"}, "compression is 'tide'; known: 'tied', 'untied', 'exact'"),
        ({"global_pool": "max"}, "global_pool is 'max'; known: 'token', 'avg', ''"),
        ({"stem": "sten"}, "stem is 'sten'; known: 'linear', 'conv'"),
        ({"init": "zeros"}, "init is 'zeros'; known: 'orthogonal', 'published'"),
    ],
)
def test_wrong_words_are_refused_with_the_known_ones(options, message):
    with pytest.raises(ConfigError, match=message):
        create_model("crate_digits", **options)
    with pytest.raises(ValueError, match=message):
        CRATE(img_size=8, patch_size=2, in_chans=1, embed_dim=8, num_heads=2, depth=1, **options)


@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_calls_are_refused():
    model = digits()
    with pytest.raises(ValueError, match="images are 10 x 8, the model was built for 8 x 8 - resize them"):
        model(torch.zeros(1, 1, 10, 8))
    with pytest.raises(ValueError, match="9 / 2 is not whole"):
        digits(dynamic_img_size=True)(torch.zeros(1, 1, 9, 8))
    with pytest.raises(ValueError, match="output_fmt is 'CHW'; known: 'NCHW', 'NLC'"):
        model.forward_intermediates(torch.zeros(1, 1, 8, 8), output_fmt="CHW")
    with pytest.raises(ValueError, match="global_pool is 'max'"):
        model.reset_classifier(3, "max")


def test_any_timm_model_is_made_by_name():
    model = create_model("vit_tiny_patch16_224", num_classes=2, depth=1)
    assert isinstance(model, timm.models.VisionTransformer)


def test_list_names_white_box_models_first_and_each_once():
    names = list_models()
    assert len(set(names)) == len(names)
    assert [n.startswith("vit") for n in names] == sorted(n.startswith("vit") for n in names)
