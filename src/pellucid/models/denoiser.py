r"""Learned denoisers: networks that guess the clean sample, told how noisy it is.

:class:`Preconditioned` gives a network samples of one size at every noise level and asks it for an answer of
one size (Karras et al. 2022). The networks inside are :class:`CRATEDenoiser`, on the tokens of a picture, and
:class:`MLPDenoiser`, on plain coordinates.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pellucid.errors import ConfigError
from pellucid.models.embed import TokenEmbedding
from pellucid.objectives.denoising import Level, Schedule
from pellucid.steps import MSSA, Layer, OnStep, OvercompleteISTA, UntiedMSSA, unroll


class Preconditioned(nn.Module):
    r"""A denoiser made of a network F, which answers what the best guess for a Gaussian misses.

    With data of mean m and standard deviation s, and :math:`v = \alpha^2 s^2 + \sigma^2`,

    .. math:: \bar x(x_t, t) = m + \frac{\alpha s^2}{v}(x_t - \alpha m)
        + \frac{s\,\sigma}{\sqrt v}\,
        F\Bigl(\frac{x_t - \alpha m}{\sqrt v},\ \log\frac{\sigma}{\alpha s}\Bigr)

    The first two terms are the posterior mean of a Gaussian. Written for any schedule, and finite where no
    signal is left (:math:`\alpha = 0`).

    Args:
        network: F: ``(n, d)`` samples of unit variance and ``(n,)`` levels to ``(n, d)``.
        schedule: what a level means.
        mean: m, ``(d,)``.
        scale: s.
    """

    mean: Tensor

    def __init__(
        self, network: nn.Module, schedule: Schedule, mean: Float[Tensor, " d"], scale: float
    ) -> None:
        super().__init__()
        self.network, self.schedule, self.scale = network, schedule, scale
        self.register_buffer("mean", mean)

    def forward(self, x_t: Float[Tensor, "*n d"], t: Level) -> Float[Tensor, "*n d"]:
        """The guess of the clean samples, for one level or one for each sample."""
        t = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device).expand(x_t.shape[:-1])
        alpha, sigma, spread = (part.unsqueeze(-1) for part in self._factors(t))
        centred = x_t - alpha * self.mean
        level = (sigma / (alpha * self.scale).clamp(min=1e-6)).clamp(1e-4, 1e4).log()
        seen = (centred / spread).reshape(-1, x_t.shape[-1])
        moved = self.network(seen, level.reshape(-1)).reshape(x_t.shape)
        linear = alpha * self.scale**2 / spread**2 * centred
        return self.mean + linear + self.scale * sigma / spread * moved

    def weight(self, t: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        r"""Factor on the squared error that makes all levels count the same, :math:`v/(s\sigma)^2`."""
        _, sigma, spread = self._factors(t)
        return (spread / (self.scale * sigma)).square()

    def _factors(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = (torch.as_tensor(f) for f in (self.schedule.alpha(t), self.schedule.sigma(t)))
        return alpha, sigma, ((alpha * self.scale).square() + sigma.square()).sqrt()


class LevelEmbedding(nn.Module):
    """A vector for the log of the noise-to-signal ratio: waves of many lengths, then a small network."""

    def __init__(self, dim: int, num_waves: int = 16) -> None:
        super().__init__()
        self.num_waves = num_waves
        self.map = nn.Sequential(nn.Linear(2 * num_waves, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, level: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        rates = torch.logspace(-1, 1, self.num_waves, dtype=level.dtype, device=level.device)
        angles = level.unsqueeze(-1) * rates
        return self.map(torch.cat([angles.cos(), angles.sin()], -1))


class MLPDenoiser(nn.Module):
    """For samples of a few coordinates: residual layers that all hear the level.

    Args:
        dim: coordinates d of a sample.
        width: of the layers.
        depth: number of them.
    """

    def __init__(self, dim: int, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.level = LevelEmbedding(width)
        self.enter = nn.Linear(dim, width)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, dim)
        _begin_silent(self.leave)

    def forward(self, x: Float[Tensor, "n d"], level: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        told = self.level(level)
        hidden = self.enter(x)
        for layer in self.layers:
            hidden = hidden + layer(hidden + told)
        return self.leave(self.norm(hidden))


class CRATEDenoiser(nn.Module):
    r"""CRATE as a denoiser of pictures: each layer compresses tokens around its subspaces, then codes them.

    The noise level is added to every token at the door. Compression is :class:`~pellucid.steps.mssa.MSSA`,
    whose heads are denoisers themselves (see :class:`pellucid.analytic.denoisers.SubspaceMixture`); coding is
    CRATE-alpha's overcomplete, residual ISTA.

    Args:
        image_shape: channels, height and width; the samples are such pictures as rows.
        patch_size: must divide height and width.
        embed_dim, depth, num_heads: as in :class:`~pellucid.models.crate.CRATE`.
        compression: ``"tied"`` (MSSA as derived) or ``"untied"`` (with a free output matrix).
        overcomplete: atoms for each dimension of a token.
        step_size, sparsity: of ISTA.

    Raises:
        ConfigError: a patch that does not tile the picture.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        patch_size: int = 2,
        embed_dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        *,
        compression: str = "tied",
        overcomplete: int = 2,
        step_size: float = 0.3,
        sparsity: float = 0.03,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        if height % patch_size or width % patch_size:
            raise ConfigError(f"patches of {patch_size} do not tile pictures of {height} x {width}")
        if compression not in ("tied", "untied"):
            raise ConfigError(f"compression is {compression!r}; known: 'tied', 'untied'")
        self.image_shape, self.patch_size = image_shape, patch_size
        attention = MSSA if compression == "tied" else UntiedMSSA
        self.embed = TokenEmbedding(
            (height, width), patch_size, channels, embed_dim, stem="conv", class_token=False
        )
        self.level = LevelEmbedding(embed_dim)
        self.layers = nn.ModuleList(
            Layer(
                {
                    "compress": attention(embed_dim, num_heads, norm=nn.LayerNorm(embed_dim)),
                    "sparsify": OvercompleteISTA(
                        embed_dim,
                        overcomplete * embed_dim,
                        step_size=step_size,
                        sparsity=sparsity,
                        decoupled=True,
                        residual=True,
                        norm=nn.LayerNorm(embed_dim),
                    ),
                }
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.leave = nn.Linear(embed_dim, channels * patch_size**2)
        _begin_silent(self.leave)

    def forward(
        self, x: Float[Tensor, "n d"], level: Float[Tensor, " n"], on_step: OnStep | None = None
    ) -> Float[Tensor, "n d"]:
        """``on_step`` sees every step, as in ``unroll``."""
        z = self.embed(x.unflatten(-1, self.image_shape)) + self.level(level).unsqueeze(1)
        pixels = self.leave(self.norm(unroll(self.layers, z, on_step=on_step)))
        c, p = self.image_shape[0], self.patch_size
        grid = pixels.unflatten(-1, (c, p, p)).unflatten(1, self.embed.grid(*self.image_shape[1:]))
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)  # n c rows p columns p


def _begin_silent(linear: nn.Linear) -> None:
    """Nothing to say before it has learnt something."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def picture_shape(dim: int) -> tuple[int, int, int]:
    """The square gray picture that ``dim`` numbers make.

    Raises:
        ConfigError: they make none.
    """
    side = math.isqrt(dim)
    if side * side != dim:
        raise ConfigError(
            f"{dim} numbers are no square gray picture - give pictures as (n, c, h, w), or take network='mlp'"
        )
    return 1, side, side
