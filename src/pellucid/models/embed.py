"""From images to tokens: patches, positions, a class token and registers."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from timm.layers import resample_abs_pos_embed, to_2tuple
from torch import Tensor, nn

Size = int | tuple[int, int] | list[int]  # a list: as JSON and YAML give a pair back
StemName = Literal["linear", "conv"]


class LinearStem(nn.Module):
    """Patches flattened row by row with the channel last, then LayerNorm, Linear, LayerNorm: CRATE's stem."""

    def __init__(self, patch_size: tuple[int, int], in_chans: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        width = patch_size[0] * patch_size[1] * in_chans
        self.norm_in = nn.LayerNorm(width)
        self.proj = nn.Linear(width, dim)
        self.norm_out = nn.LayerNorm(dim)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        p, q = self.patch_size
        patches = images.unflatten(-1, (-1, q)).unflatten(-3, (-1, p))  # b c h p w q
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return self.norm_out(self.proj(self.norm_in(patches)))


class ConvStem(nn.Module):
    """One convolution with stride and kernel of a patch: the stem of ViT and CRATE-alpha."""

    def __init__(self, patch_size: tuple[int, int], in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return self.proj(images).flatten(2).mT


class TokenEmbedding(nn.Module):
    """Images to tokens: ``[class, registers, patches]`` with learned positions on class and patches.

    Args:
        img_size: height and width the positions are learned at.
        patch_size: must divide ``img_size``.
        in_chans: channels of an image.
        dim: width of a token.
        stem: ``"linear"`` (published CRATE) or ``"conv"``.
        class_token: prepend one token that stands for the image.
        reg_tokens: number of registers, tokens without a position that give global computation a place.
        dynamic_img_size: accept any size that patches tile, with interpolated positions.
        pos_std: standard deviation of the fresh positions, of the size of patch features so that they are
            heard from the start; class token and registers begin at 0.02.
    """

    def __init__(
        self,
        img_size: Size,
        patch_size: Size,
        in_chans: int,
        dim: int,
        *,
        stem: StemName = "linear",
        class_token: bool = True,
        reg_tokens: int = 0,
        dynamic_img_size: bool = False,
        pos_std: float = 0.5,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        self.dynamic_img_size = dynamic_img_size
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.grid_size = self._grid(self.img_size)
        stems = {"linear": LinearStem, "conv": ConvStem}
        if stem not in stems:
            raise ValueError(f"stem is {stem!r}; known: {', '.join(map(repr, stems))}")
        self.stem = stems[stem](self.patch_size, in_chans, dim)
        positions = self.grid_size[0] * self.grid_size[1] + int(class_token)
        self.pos_embed = nn.Parameter(torch.empty(1, positions, dim))
        self.class_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        self.reg_tokens = nn.Parameter(torch.empty(1, reg_tokens, dim)) if reg_tokens else None
        self.init_weights(pos_std)

    @torch.no_grad()
    def init_weights(self, pos_std: float = 0.5) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=pos_std, a=-4 * pos_std, b=4 * pos_std)
        for parameter in (self.class_token, self.reg_tokens):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        positions = self._positions(images.shape[-2], images.shape[-1])
        z = self.stem(images)
        if self.class_token is not None:
            z = torch.cat([self.class_token.expand(z.shape[0], -1, -1), z], 1)
        z = z + positions
        if self.reg_tokens is not None:
            at = int(self.class_token is not None)
            z = torch.cat([z[:, :at], self.reg_tokens.expand(z.shape[0], -1, -1), z[:, at:]], 1)
        return z

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches for an image of this size."""
        return height // self.patch_size[0], width // self.patch_size[1]

    @torch.no_grad()
    def set_input_size(self, img_size: Size) -> None:
        """Learned positions resampled, for good, to another image size."""
        size = to_2tuple(img_size)
        grid = self._grid(size)
        self.pos_embed = nn.Parameter(self._resampled(grid))
        self.img_size, self.grid_size = size, grid

    def _positions(self, height: int, width: int) -> Tensor:
        if (height, width) == self.img_size:
            return self.pos_embed
        if not self.dynamic_img_size:
            raise ValueError(
                f"images are {height} x {width}, the model was built for "
                f"{self.img_size[0]} x {self.img_size[1]} - resize them, or build it with "
                f"dynamic_img_size=True"
            )
        return self._resampled(self._grid((height, width)))

    def _resampled(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid_size:
            return self.pos_embed
        prefix = self.pos_embed.shape[1] - self.grid_size[0] * self.grid_size[1]
        return resample_abs_pos_embed(self.pos_embed, list(grid), list(self.grid_size), prefix)

    def _grid(self, img_size: tuple[int, int]) -> tuple[int, int]:
        for side, patch in zip(img_size, self.patch_size, strict=True):
            if side < patch:
                raise ValueError(f"an image side of {side} is smaller than a patch of {patch} - enlarge it")
            if side % patch:
                down = side // patch * patch
                raise ValueError(f"{side} / {patch} is not whole; nearest sizes {down} or {down + patch}")
        return self.grid(*img_size)
