"""CRATE-alpha, CRATE-MAE and ToST against what the authors' programs gave: the same numbers to 1e-5."""

import pytest
import torch

from pellucid.errors import CheckpointError, ConfigError
from pellucid.models import CRATE, CRATEMAE, ToST, create_model, from_published
from pellucid.models.published import open_published

# What the keys cannot tell of the small models that were recorded.
HINTS = {
    "crate_alpha": {"num_heads": 4},
    "crate_mae": {"num_heads": 4, "final_norm_eps": 1e-5, "norm_pix_loss": True},
    "tost_vision": {"img_size": 64},
}


def state_of(record):
    return {key.removeprefix("state/"): value for key, value in record.items() if key.startswith("state/")}


@pytest.fixture(params=sorted(HINTS))
def name(request):
    return request.param


@pytest.fixture
def record(recorded, name):
    return recorded(name)


@pytest.fixture
def model(record, name):
    return from_published(state_of(record), **HINTS[name]).eval()


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(
    ("name", "cls"), [("crate_alpha", CRATE), ("crate_mae", CRATEMAE), ("tost_vision", ToST)]
)
def test_the_family_is_recognised(record, name, cls, model):
    assert type(model) is cls
    rebuilt = create_model(model.architecture, **model.model_args)
    rebuilt.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["crate_alpha", "tost_vision"])
def test_logits(record, model):
    close(model(record["input"]), record["logits"])


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("name", ["crate_alpha", "tost_vision"])
@pytest.mark.parametrize("training", [False, True])
def test_logits_compiled(record, model, training):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        close(compiled(record["input"]), record["logits"])


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("name", ["crate_alpha", "tost_vision"])
def test_logits_exported(record, model):
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (record["input"],), dynamic_shapes=({0: batch},))
    close(program.module()(record["input"]), record["logits"])


@pytest.mark.parametrize("name", ["crate_alpha"])
def test_gradients_of_alpha(record, model):
    images = record["input"].requires_grad_()
    # The recorded gradients are of the sum of squared logits.
    model(images).square().sum().backward()
    close(images.grad, record["grad/input"])
    close(model.layers[0]["sparsify"].dictionary.grad, record["grad/D0"])


@pytest.mark.parametrize("name", ["crate_mae"])
def test_masked_autoencoder(record, model):
    mask = model.random_mask(2, 0.75, record["noise"])
    assert torch.equal(mask, record["mask"].bool())
    close(model.encode_masked(record["input"], mask), record["latent"])
    close(model.reconstruct(record["input"], mask), record["pred"])
    close(model.masked_loss(record["input"], mask).mean(), record["loss"])


@pytest.mark.parametrize("name", ["crate_mae"])
def test_what_the_published_autoencoder_never_uses_is_left_out_by_name(record, name):
    opened = open_published(state_of(record), **HINTS[name])
    assert set(opened.ignored) == {"pos_embed", "decoder_embed.weight", "decoder_embed.bias"}


@pytest.mark.parametrize("name", ["tost_vision"])
def test_tost_needs_no_image_size_to_load_and_takes_another(record, name):
    assert from_published(state_of(record)).embed.img_size == (224, 224)
    model = from_published(state_of(record), dynamic_img_size=True).eval()
    close(model(record["input"]), record["logits"])


def test_wrappers_are_stripped(record, name, model):
    state = {f"module._orig_mod.{key}": value for key, value in state_of(record).items()}
    again = from_published(state, **HINTS[name])
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_every_key_is_needed(record, name):
    """Each key of a file, taken away, is noticed, or was never used."""
    state = state_of(record)
    for key in state:
        without = {other: value for other, value in state.items() if other != key}
        if key in ("pos_embed", "decoder_embed.weight", "decoder_embed.bias") and name == "crate_mae":
            from_published(without, **HINTS[name])
            continue
        if key in ("mlp_head.1.weight", "head.weight"):  # a file without a classifier
            expected = r"unexpected \(1\): head.bias"
        else:
            expected = "missing|unexpected|not a known published layout|keys of "
        with pytest.raises(CheckpointError, match=expected):
            from_published(without, **HINTS[name])


def test_unknown_hints_are_refused(record, name):
    with pytest.raises(ConfigError, match="unknown model option 'heads'"):
        from_published(state_of(record), heads=4)


PARAMETERS = {
    "crate_tiny_patch16_224": 6.091,
    "crate_small_patch16_224": 13.116,
    "crate_base_patch16_224": 22.796,
    "crate_large_patch16_224": 77.641,
    "crate_alpha_base_patch16_224": 72.33,
    "tost_tiny_12_patch16_224": 5.77,
    "tost_tiny_24_patch16_224": 10.22,
    "tost_small_12_patch16_224": 22.59,
    "tost_small_24_patch16_224": 40.34,
    "tost_medium_24_patch16_224": 71.48,
    "tost_large_24_patch16_224": 160.29,
}


@pytest.mark.parametrize(("architecture", "millions"), PARAMETERS.items())
def test_published_sizes(architecture, millions):
    with torch.device("meta"):
        model = create_model(architecture)
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(
    ("size", "dim", "millions"),
    [("tiny", 384, 11.56), ("small", 576, 25.41), ("base", 768, 44.64), ("large", 1024, 154.27)],
)
def test_published_sizes_of_the_autoencoder(size, dim, millions):
    """Theirs hold positions and a linear map beside that nothing ever uses."""
    from pellucid.models.mae import PUBLISHED

    with torch.device("meta"):
        model = create_model(f"crate_mae_{size}_patch16_224", **PUBLISHED)
    dead = 197 * dim + dim * dim + dim
    count = sum(parameter.numel() for parameter in model.parameters()) + dead
    assert count / 1e6 == pytest.approx(millions, abs=0.006)
