"""Pictures of what was hidden: which pixels come from where."""

import pytest
import torch

from pellucid.errors import ConfigError
from pellucid.measure.reconstruction import reconstructions
from pellucid.models import create_model


def pixels_of(model, mask):
    """True where a pixel lies in a hidden patch."""
    return mask.unflatten(-1, model.embed.grid_size).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_loss_of_the_filled_picture_is_the_models_own(norm_pix_loss):
    model = create_model("crate_mae_digits", norm_pix_loss=norm_pix_loss).eval()
    images, mask = torch.randn(3, 1, 8, 8), model.random_mask(3)
    original, masked, filled = reconstructions(model, images, mask)
    hidden = pixels_of(model, mask).expand_as(images)
    assert torch.equal(original, images)
    for picture in (masked, filled):
        assert torch.equal(picture[~hidden], images[~hidden])
    assert not masked[hidden].any()
    error = model.patchify((filled - images).square()).mean(-1)
    if norm_pix_loss:
        error = error / (model.patchify(images).var(-1) + 1e-6)
    of_hidden = torch.stack([row[hide].mean() for row, hide in zip(error, mask, strict=True)])
    torch.testing.assert_close(of_hidden, model.masked_loss(images, mask).detach())


def test_the_mode_of_the_model_is_left_as_it_was():
    model = create_model("vit_mae_digits").train()
    filled = reconstructions(model, torch.randn(1, 1, 8, 8), model.random_mask(1)).filled
    assert model.training
    assert not filled.requires_grad


def test_what_cannot_be_filled():
    images = torch.randn(2, 1, 8, 8)
    with pytest.raises(ConfigError, match="CRATE has no decoder to fill in patches - take crate_mae_digits"):
        reconstructions(create_model("crate_digits"), images, torch.ones(2, 16, dtype=torch.bool))
    model = create_model("crate_mae_digits")
    uneven = torch.zeros(2, 16, dtype=torch.bool)
    uneven[0, :3] = uneven[1, :2] = True
    with pytest.raises(ConfigError, match=r"hides \[2, 3\] patches; expected \(2, 16\) with the same number"):
        reconstructions(model, images, uneven)
    with pytest.raises(ConfigError, match=r"the mask is \(2, 9\)"):
        reconstructions(model, images, uneven[:, :9])
    with pytest.raises(ConfigError, match="images are 9 x 8, the model was built for 8 x 8"):
        reconstructions(model, torch.randn(2, 1, 9, 8), uneven)
