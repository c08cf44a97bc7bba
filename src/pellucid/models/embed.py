"""From images to tokens: patches, positions, a class token and registers."""

from __future__ import annotations

import copy
from itertools import chain, pairwise
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models.xcit import PositionalEncodingFourier
from torch import Tensor, nn

from pellucid.errors import ConfigError

Size = int | tuple[int, int] | list[int]  # a list: as JSON and YAML give a pair back
StemName = Literal["linear", "conv", "conv_bn"]
Positions = Literal["learned", "fourier"]


def embedding(model: Any) -> Any:
    """What cuts pictures into patches, in our models and in timm's; None in a model of another kind."""
    return getattr(model, "embed", None) or getattr(model, "patch_embed", None)


def image_size(model: Any) -> tuple[int, int]:
    """Height and width of the images that a model was built for."""
    size = getattr(embedding(model), "img_size", None) or model.pretrained_cfg["input_size"][1:]
    return int(size[0]), int(size[1])


def patch_grid(model: Any) -> tuple[int, int]:
    """Rows and columns of patches at that size, of a model that has them."""
    rows, columns = embedding(model).grid_size
    return int(rows), int(columns)


@torch.no_grad()
def resized(model: Any, img_size: tuple[int, int]) -> Any:
    """The model for images of another size: positions resampled, all other weights its own, no copies.

    Args:
        model: ours or timm's; left as it is, and returned itself where it has that size already.
        img_size: height and width, multiples of a patch.

    Raises:
        ConfigError: a model of another kind.
    """
    if image_size(model) == img_size:
        return model
    if not hasattr(model, "set_input_size") or getattr(embedding(model), "patch_size", None) is None:
        raise ConfigError(
            f"{type(model).__name__} takes images of {image_size(model)} only - take CRATE, ToST, a timm ViT"
        )
    shared = {id(weight): weight for weight in chain(model.parameters(), model.buffers())}
    other = copy.deepcopy(model, shared)  # what stands in the memo is not copied
    other.set_input_size(img_size)
    return other


def patchify(images: Float[Tensor, "b c h w"], patch_size: tuple[int, int]) -> Float[Tensor, "b n q"]:
    """Pixels of each patch, row by row with the channel last."""
    height, width = patch_size
    patches = images.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))  # b c rows h columns w
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


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
        patches = patchify(images, self.patch_size)
        return self.norm_out(self.proj(self.norm_in(patches)))


class ConvStem(nn.Module):
    """One convolution with stride and kernel of a patch: the stem of ViT and CRATE-alpha."""

    def __init__(self, patch_size: tuple[int, int], in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return self.proj(images).flatten(2).mT


class ConvNormStem(nn.Module):
    """ToST's stem: 3 x 3 convolutions, each with a BatchNorm, halve the picture until a patch is a pixel.

    Width doubles on the way, up to that of a token. Patches see beyond their own edges.

    **Departs:** the published program synchronises its BatchNorm over processes, which cannot train on a CPU.
    """

    def __init__(self, patch_size: tuple[int, int], in_chans: int, dim: int) -> None:
        super().__init__()
        halvings = patch_size[0].bit_length() - 1
        if patch_size[0] != patch_size[1] or patch_size[0] != 2**halvings or halvings == 0:
            raise ValueError(
                f"stem 'conv_bn' halves the picture: a patch of {patch_size[0]} x {patch_size[1]} is not a "
                f"power of two - take 2, 4, 8 or 16, or another stem"
            )
        if dim % 2 ** (halvings - 1):
            raise ValueError(f"stem 'conv_bn' needs a width that {2 ** (halvings - 1)} divides; got {dim}")
        widths = [in_chans, *(dim // 2**i for i in reversed(range(halvings)))]
        self.proj = nn.Sequential()
        for i, (before, after) in enumerate(pairwise(widths)):
            if i:
                self.proj.append(nn.GELU())
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            self.proj.append(nn.Sequential(conv, nn.BatchNorm2d(after)))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return self.proj(images).flatten(2).mT


STEMS: dict[str, type[nn.Module]] = {"linear": LinearStem, "conv": ConvStem, "conv_bn": ConvNormStem}


class TokenEmbedding(nn.Module):
    """Images to tokens: ``[class, registers, patches]`` with positions on class and patches.

    Args:
        img_size: height and width the positions are learned at.
        patch_size: must divide ``img_size``.
        in_chans: channels of an image.
        dim: width of a token.
        stem: ``"linear"`` (published CRATE), ``"conv"`` (CRATE-alpha, ViT) or ``"conv_bn"`` (ToST).
        class_token: prepend one token that stands for the image.
        reg_tokens: number of registers, tokens without a position that give global computation a place.
        dynamic_img_size: accept any size that patches tile, with interpolated positions.
        positions: ``"learned"``, or ``"fourier"``: sines of row and column through a learned map, for the
            patches only, at any size.
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
        positions: Positions = "learned",
        pos_std: float = 0.5,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.img_size, self.patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        self.dynamic_img_size = dynamic_img_size
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.grid_size = self._grid(self.img_size)
        if stem not in STEMS:
            raise ValueError(f"stem is {stem!r}; known: {', '.join(map(repr, STEMS))}")
        if positions not in ("learned", "fourier"):
            raise ValueError(f"positions is {positions!r}; known: 'learned', 'fourier'")
        self.stem = STEMS[stem](self.patch_size, in_chans, dim)
        self.fourier = PositionalEncodingFourier(dim=dim) if positions == "fourier" else None
        self.pos_embed: nn.Parameter | None = None
        if positions == "learned":
            places = self.grid_size[0] * self.grid_size[1] + int(class_token)
            self.pos_embed = nn.Parameter(torch.empty(1, places, dim))
        self.class_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        self.reg_tokens = nn.Parameter(torch.empty(1, reg_tokens, dim)) if reg_tokens else None
        self.init_weights(pos_std)

    @torch.no_grad()
    def init_weights(self, pos_std: float = 0.5) -> None:
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=pos_std, a=-4 * pos_std, b=4 * pos_std)
        for parameter in (self.class_token, self.reg_tokens):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b p"] | None = None,
        mask_token: Float[Tensor, "1 1 d"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Tokens of the images. Where ``mask`` is true the mask token stands for the patch."""
        height, width = images.shape[-2:]
        self._check_size(height, width)
        z = self.stem(images)
        if mask is not None and mask_token is not None:
            z = torch.where(mask.unsqueeze(-1), mask_token.to(z.dtype), z)
        if self.fourier is not None:
            z = z + self.fourier(1, *self.grid(height, width)).flatten(2).mT
        if self.class_token is not None:
            z = torch.cat([self.class_token.expand(z.shape[0], -1, -1), z], 1)
        if self.pos_embed is not None:
            z = z + self._resampled(self.grid(height, width))
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
        if self.pos_embed is not None:
            self.pos_embed = nn.Parameter(self._resampled(grid))
        self.img_size, self.grid_size = size, grid

    def _check_size(self, height: int, width: int) -> None:
        if (height, width) == self.img_size:
            return
        if not self.dynamic_img_size:
            raise ValueError(
                f"images are {height} x {width}, the model was built for "
                f"{self.img_size[0]} x {self.img_size[1]} - resize them, or build it with "
                f"dynamic_img_size=True"
            )
        self._grid((height, width))

    def _resampled(self, grid: tuple[int, int]) -> Tensor:
        assert self.pos_embed is not None
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
