"""What a masked autoencoder makes of hidden patches, as pictures."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pellucid.errors import ConfigError
from pellucid.models.modes import in_eval_mode


class Reconstructions(NamedTuple):
    """Pictures ``(b, c, h, w)`` on the scale of the model's input.

    Attributes:
        images: as given.
        masked: hidden patches at 0, the mean of the data.
        filled: hidden patches as the decoder sees them, the others as given.
    """

    images: Tensor
    masked: Tensor
    filled: Tensor


@torch.no_grad()
def reconstructions(
    model: Any, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b p"]
) -> Reconstructions:
    """Original, masked and filled pictures.

    A model that learnt from patches of mean 0 and variance 1 (``norm_pix_loss``) says nothing of a patch's
    own mean and variance: they are taken from the original, as He et al. (2021) do in their pictures.

    Args:
        model: a masked autoencoder of ours.
        images: as the model takes them.
        mask: true where a patch is hidden, the same number in every image.

    Raises:
        ConfigError: a model without a decoder, or a mask that does not fit.
    """
    if not hasattr(model, "reconstruct"):
        raise ConfigError(
            f"{type(model).__name__} has no decoder to fill in patches - take crate_mae_digits or the like"
        )
    if tuple(images.shape[-2:]) != model.embed.img_size:
        raise ConfigError(
            f"images are {images.shape[-2]} x {images.shape[-1]}, the model was built for "
            f"{model.embed.img_size[0]} x {model.embed.img_size[1]} - resize them"
        )
    patches = model.patchify(images)
    if mask.shape != patches.shape[:2] or len(set(mask.sum(-1).tolist())) != 1:
        raise ConfigError(
            f"the mask is {tuple(mask.shape)} and hides {sorted(set(mask.sum(-1).tolist()))} patches; "
            f"expected {tuple(patches.shape[:2])} with the same number in every image"
        )
    with in_eval_mode(model):
        guess = model.reconstruct(images, mask)
    if model.norm_pix_loss:
        guess = guess * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    hidden = mask.unsqueeze(-1)
    return Reconstructions(
        images,
        model.unpatchify(patches.masked_fill(hidden, 0.0)),
        model.unpatchify(torch.where(hidden, guess.to(patches.dtype), patches)),
    )
