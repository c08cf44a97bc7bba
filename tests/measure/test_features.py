"""Features of our models and timm's: each kind of token against the model's own interfaces."""

import pytest
import timm
import torch

from pellucid.errors import ConfigError, DataError
from pellucid.measure.features import feature_batches, features, patch_grid, prefix_length
from pellucid.models import create_model

SMALL = {"embed_dim": 32, "num_heads": 4, "depth": 2, "num_classes": 0}
FAMILIES = ["crate_digits", "crate_mae_digits", "tost_digits", "vit_digits"]


def small(name, **options):
    torch.manual_seed(0)
    return create_model(name, **{**SMALL, **options}).eval()


def batches(count=10, size=4, shape=(1, 8, 8)):
    """``(images, labels, index)``, the last batch smaller."""
    images = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
    index = torch.arange(count) + 100
    return [(x, i % 3, i) for x, i in zip(images.split(size), index.split(size), strict=True)]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_kind_of_token(name):
    model, data = small(name), batches()
    images = torch.cat([batch[0] for batch in data])
    with torch.no_grad():
        z = model.forward_features(images)
        pooled = model.forward_head(z, pre_logits=True)
    expected = {
        "pooled": pooled,
        "cls": z[:, 0],
        "patch": z[:, 1:],
        "avg": z[:, 1:].mean(1),
        "all": z,
    }
    for tokens, values in expected.items():
        found = features(model, data, tokens)
        torch.testing.assert_close(found.values, values, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.index, torch.arange(100, 110))
        assert torch.equal(found.labels, found.index % 3)
    assert patch_grid(model, (8, 8), z.shape[1] - 1) == (4, 4)


@pytest.mark.parametrize(
    ("name", "options"), [("crate_digits", {"reg_tokens": 3}), ("vit_digits", {"reg_tokens": 3})]
)
def test_registers_are_no_patches(name, options):
    model = small(name, **options)
    found = {tokens: features(model, batches(), tokens).values for tokens in ("cls", "avg", "patch", "all")}
    assert prefix_length(model) == 4
    assert found["all"].shape == (10, 20, 32)
    torch.testing.assert_close(found["patch"], found["all"][:, 4:])
    torch.testing.assert_close(found["cls"], found["all"][:, 0])
    torch.testing.assert_close(found["avg"], found["patch"].mean(1))


@pytest.mark.parametrize("name", ["crate_digits", "vit_digits"])
def test_without_a_class_token(name):
    model = small(name, class_token=False, global_pool="avg")
    with pytest.raises(ConfigError, match=f"{name} has no class token - take avg"):
        features(model, batches(), "cls")
    found = features(model, batches(), "patch").values
    assert found.shape == (10, 16, 32)
    torch.testing.assert_close(features(model, batches(), "avg").values, found.mean(1))


def test_a_model_with_classes_gives_what_its_classifier_reads():
    model = small("crate_digits", num_classes=5)
    images = batches()[0][0]
    read = features(model, [images], "pooled").values
    torch.testing.assert_close(model.head(read), model(images))


def test_a_convolutional_network_has_pooled_features_only():
    model = timm.create_model("test_resnet", num_classes=0)
    images = torch.randn(2, 3, 32, 32)
    assert features(model, [images]).values.shape == (2, model.num_features)
    for tokens in ("patch", "all", "avg"):
        with pytest.raises(ConfigError, match="pooled"):
            features(model, [images], tokens)


def test_images_alone_are_counted():
    found = features(small("crate_digits"), [batch[0] for batch in batches()])
    assert found.index.tolist() == list(range(10))
    assert found.labels.tolist() == [-1] * 10
    labelled = features(small("crate_digits"), [batch[:2] for batch in batches()])
    assert labelled.index.tolist() == list(range(10))
    assert labelled.labels.tolist() == [(100 + i) % 3 for i in range(10)]


def test_batches_are_read_one_at_a_time():
    read, told = [], []

    def lazily():
        for batch in batches():
            read.append(len(batch[0]))
            yield batch

    stream = feature_batches(small("crate_digits"), lazily(), "patch", progress=told.append)
    assert read == []
    first = next(stream)
    assert (read, first.values.shape) == ([4], (4, 16, 32))
    list(stream)
    assert read == told == [4, 4, 2]


def test_the_model_is_left_as_it_was():
    model = small("crate_digits").train()
    model.norm.eval()
    features(model, batches())
    assert model.training
    assert not model.norm.training
    assert all(p.grad is None for p in model.parameters())


def test_half_precision_models_give_float32():
    found = features(small("crate_digits").bfloat16(), [batches()[0][0].bfloat16()])
    assert found.values.dtype == torch.float32


def test_refuses():
    model = small("crate_digits")
    with pytest.raises(ConfigError, match="tokens is 'clss' - did you mean 'cls'"):
        features(model, batches(), "clss")
    with pytest.raises(DataError, match="no images"):
        features(model, [])
    with pytest.raises(ConfigError, match="does not pool"):
        features(small("crate_digits", global_pool=""), batches())
    with pytest.raises(ConfigError, match="no grid"):
        patch_grid(model, (8, 8), 15)
