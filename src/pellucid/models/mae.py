"""CRATE-MAE: an encoder that compresses and sparsifies, a decoder that runs it backwards (Pai et al. 2023).

The decoder's layer undoes the encoder's in reverse order: ``z <- LayerNorm(z) D^T`` speaks the code in a
dictionary, ``z <- z - MSSA(z)`` moves away from the subspaces. Trained to fill in masked patches. Beside it
stands the ordinary masked autoencoder (He et al. 2021): the same with black boxes on both sides.

**Departs**, when ``encode="all"``: the published program sends mask tokens through the encoder, at four times
the cost of the visible patches alone. New models are better off with ``encode="visible"``.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from pellucid.models.backbone import cfg_of, register
from pellucid.models.crate import ABLATION, CRATE, CRATE_SIZES, DIGITS, MICRO, SMALL_PICTURES
from pellucid.models.embed import patchify
from pellucid.objectives import masked_error
from pellucid.steps import MHSA, MLP, Decompression, Layer, OnStep, Synthesis, unroll

Decoder = Literal["reverse", "mhsa_mlp"]


def build_decoder_layer(dim: int, num_heads: int, kind: Decoder = "reverse") -> Layer:
    """One layer of the decoder: speak the code, then decompress; or attention and MLP as in any ViT."""
    norm = partial(nn.LayerNorm, dim)
    if kind == "mhsa_mlp":
        return Layer({"compress": MHSA(dim, num_heads, norm=norm()), "sparsify": MLP(dim, norm=norm())})
    return Layer(
        {
            "synthesise": Synthesis(dim, enter=norm()),
            "decompress": Decompression(dim, num_heads, norm=norm()),
        }
    )


def num_hidden(patches: int, ratio: float) -> int:
    """How many of an image's patches a mask hides: ``int(patches * (1 - ratio))`` stay, as published.

    Raises:
        ValueError: a ratio that hides nothing or everything.
    """
    kept = int(patches * (1 - ratio))
    if not 0 < kept < patches:
        raise ValueError(f"a mask ratio of {ratio} leaves {kept} of {patches} patches to see")
    return patches - kept


class CRATEMAE(CRATE):
    """A CRATE that can also fill in masked patches.

    As a backbone, ``forward`` and timm's interfaces, it is the encoder on whole images.
    :meth:`reconstruct` is the masked autoencoder.

    Args:
        encode: ``"visible"`` leaves masked patches out of the encoder; ``"all"`` sends mask tokens through
            it, as published.
        decoder: ``"reverse"`` runs the encoder's steps backwards, ``"mhsa_mlp"`` is made of black boxes.
        decoder_depth: layers of the decoder; the encoder's unless given.
        decoder_num_heads: subspaces of its layers; the encoder's unless given.
        norm_pix_loss: compare patches scaled to mean 0 and variance 1.
        final_norm_eps: of the norms behind encoder and decoder; 1e-6 in the published sizes.
        crate: everything that :class:`~pellucid.models.crate.CRATE` takes.
    """

    def __init__(
        self,
        encode: Literal["visible", "all"] = "visible",
        decoder: Decoder = "reverse",
        decoder_depth: int | None = None,
        decoder_num_heads: int | None = None,
        norm_pix_loss: bool = False,
        final_norm_eps: float = 1e-5,
        **crate: Any,
    ) -> None:
        super().__init__(**crate)
        if encode not in ("visible", "all"):
            raise ValueError(f"encode is {encode!r}; known: 'visible', 'all'")
        if decoder not in get_args(Decoder):
            raise ValueError(f"decoder is {decoder!r}; known: {', '.join(map(repr, get_args(Decoder)))}")
        if self.embed.reg_tokens is not None:
            raise ValueError("CRATE-MAE has no use for registers - leave out reg_tokens")
        dim = self.embed_dim
        depth = len(self.layers) if decoder_depth is None else decoder_depth
        num_heads = crate.get("num_heads", 6) if decoder_num_heads is None else decoder_num_heads
        self.encode, self.norm_pix_loss = encode, norm_pix_loss
        self.in_chans = crate.get("in_chans", 3)
        self.norm = nn.LayerNorm(dim, eps=final_norm_eps)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder_embed: nn.Module = nn.Identity()
        self.decoder_pos_embed: nn.Parameter | None = None
        if encode == "visible":
            assert self.embed.pos_embed is not None
            self.decoder_embed = nn.Linear(dim, dim)
            self.decoder_pos_embed = nn.Parameter(torch.empty_like(self.embed.pos_embed))
            nn.init.trunc_normal_(self.decoder_pos_embed, std=0.02)
        self.decoder_layers = nn.ModuleList(
            build_decoder_layer(dim, num_heads, decoder) for _ in range(depth)
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=final_norm_eps)
        height, width = self.embed.patch_size
        self.decoder_head = nn.Linear(dim, height * width * self.in_chans)

    def random_mask(
        self, batch: int, ratio: float = 0.75, noise: Float[Tensor, "b p"] | None = None
    ) -> Bool[Tensor, "b p"]:
        """Which patches to hide: all but those with the smallest noise. The same number in every image.

        Args:
            batch: number of images.
            ratio: share of patches to hide.
            noise: uniform numbers; drawn here unless given.

        Raises:
            ValueError: a ratio that hides nothing or everything.
        """
        patches = self.embed.grid_size[0] * self.embed.grid_size[1]
        kept = patches - num_hidden(patches, ratio)
        if noise is None:
            noise = torch.rand(batch, patches, device=self.mask_token.device)
        ranks = noise.argsort(-1).argsort(-1)
        return ranks >= kept

    def reconstruct(
        self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b p"], on_step: OnStep | None = None
    ) -> Float[Tensor, "b p q"]:
        """Every patch as the decoder sees it, ``(b, patches, height * width * channels)``.

        Args:
            images: of the size that the positions are for.
            mask: true where a patch is hidden, the same number in every image.
            on_step: sees the encoder's steps, then the decoder's, numbered on.
        """
        z = self.encode_masked(images, mask, on_step)
        if self.encode == "visible":
            z = self._insert_mask_tokens(self.decoder_embed(z), mask)
        z = unroll(self.decoder_layers, z, on_step=on_step, checkpoint=self._recompute)
        return self.decoder_head(self.decoder_norm(z))[:, self.embed.num_prefix_tokens :]

    def encode_masked(
        self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b p"], on_step: OnStep | None = None
    ) -> Float[Tensor, "b n d"]:
        """Normalised tokens of the encoder: of the visible patches, or of all with mask tokens among them."""
        if self.encode == "all":
            z = self.embed(images, mask, self.mask_token)
        else:
            z = self.embed(images)
            first = self.embed.num_prefix_tokens
            patches = z[:, first:]
            visible = patches[~mask].unflatten(0, (len(z), -1))
            z = torch.cat([z[:, :first], visible], 1)
        return self.norm(unroll(self.layers, z, on_step=on_step, checkpoint=self._recompute))

    def masked_loss(self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b p"]) -> Float[Tensor, " b"]:
        """Mean squared error over the hidden patches of each image."""
        target = self.patchify(images)
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return masked_error(self.reconstruct(images, mask), target, mask)

    def patchify(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b p q"]:
        """Pixels of each patch, row by row with the channel last."""
        return patchify(images, self.embed.patch_size)

    def unpatchify(self, patches: Float[Tensor, "b p q"]) -> Float[Tensor, "b c h w"]:
        """The inverse of :meth:`patchify`, for the size that the positions are for."""
        height, width = self.embed.patch_size
        pixels = patches.unflatten(-1, (height, width, self.in_chans)).unflatten(1, self.embed.grid_size)
        return pixels.permute(0, 5, 1, 3, 2, 4).flatten(-2).flatten(-3, -2)

    def _insert_mask_tokens(
        self, z: Float[Tensor, "b v d"], mask: Bool[Tensor, "b p"]
    ) -> Float[Tensor, "b n d"]:
        assert self.decoder_pos_embed is not None
        first = self.embed.num_prefix_tokens
        patches = self.mask_token.to(z.dtype).expand(len(z), mask.shape[1], -1)
        patches = patches.masked_scatter(~mask.unsqueeze(-1), z[:, first:])
        return torch.cat([z[:, :first], patches], 1) + self.decoder_pos_embed

    def set_input_size(self, img_size: Any) -> None:
        """Positions of the encoder, and of the decoder where it has its own, resampled for good."""
        from timm.layers import resample_abs_pos_embed

        before = self.embed.grid_size
        super().set_input_size(img_size)
        if self.decoder_pos_embed is not None:
            resampled = resample_abs_pos_embed(
                self.decoder_pos_embed, list(self.embed.grid_size), list(before), self.embed.num_prefix_tokens
            )
            self.decoder_pos_embed = nn.Parameter(resampled.detach())

    def no_weight_decay(self) -> set[str]:
        """Positions and learned tokens."""
        return super().no_weight_decay() | {"mask_token", "decoder_pos_embed"}


ENCODER: dict[str, Any] = {"compression": "untied", "stem": "conv"}
"""What new CRATE-MAE share with the published ones."""

PUBLISHED: dict[str, Any] = {
    **ENCODER,
    "encode": "all",
    "sparsity": 0.5,
    "final_norm_eps": 1e-6,
    "global_pool": "token",
}
"""What the published CRATE-MAE departs by."""

POOL: dict[str, Any] = {"global_pool": "avg"}
"""Of new models: nothing asks the class token for what a picture shows, every patch must know its part."""

VIT: dict[str, Any] = {**ABLATION["mhsa_mlp"], "decoder": "mhsa_mlp", "stem": "conv", **POOL}
"""Black boxes on both sides."""


def _variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> what it is, and its sizes and options."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for size, sizes in CRATE_SIZES.items():
        meaning = (
            f"CRATE-MAE with the encoder of CRATE-{size[0].upper()}; encode='all', sparsity=0.5 published."
        )
        found[f"crate_mae_{size}_patch16_224"] = (meaning, {**sizes, **ENCODER, **POOL})
    small = "CRATE-MAE for small pictures."
    found["crate_mae_micro_patch4_32"] = (small, {**MICRO, **SMALL_PICTURES, **POOL})
    found["crate_mae_digits"] = (small, {**DIGITS, **SMALL_PICTURES, **POOL})
    ordinary = "The ordinary masked autoencoder, to stand beside CRATE-MAE of the same width and depth."
    found["vit_mae_tiny_patch16_224"] = (ordinary, {**CRATE_SIZES["tiny"], **VIT})
    found["vit_mae_micro_patch4_32"] = (ordinary, {**MICRO, **VIT, "num_heads": 6})
    found["vit_mae_digits"] = (ordinary, {**DIGITS, **VIT, "num_heads": 4})
    return found


_VARIANTS = _variants()

default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": cfg_of(sizes, num_classes=0) for name, (_, sizes) in _VARIANTS.items()}
)

for _name, (_meaning, _sizes) in _VARIANTS.items():
    register(__name__, CRATEMAE, _name, _meaning, **_sizes)
