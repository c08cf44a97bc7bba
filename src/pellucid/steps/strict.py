r"""Steps that cannot rise: what the derivation asks for, held by construction.

Each learns how far to go as a share, below one, of the longest step for which its descent is proved, and
starts where the proof holds: an audit of such a network must find that every step lowers its objective on
every image. Their ``step_size`` is that share, and ``max_step_size`` is 1.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.steps.ista import SoftISTA
from pellucid.steps.kept import Kept, is_inference
from pellucid.steps.mssa import ExactCompression
from pellucid.steps.step import full_precision


class StrictCompression(ExactCompression):
    r"""Gradient descent on R^c, subspaces orthonormal and without overlap, the step never too long.

    With :math:`U^\top U = I` over all subspaces at once the gradient is b-Lipschitz,
    :math:`b = p / (n \epsilon^2)`, so every step below 2/b lowers :math:`R^c(Z \mid U_{[K]})`.

    Args:
        dim, num_heads, head_dim, enter: see :class:`~pellucid.steps.mssa.SubspaceStep`. No norm stands
            inside: the variable is what ``enter`` makes of the tokens.
        share: where the learned share of 2/b begins; one half is the step of steepest guaranteed descent.
        eps: distortion, part of the step.

    Raises:
        ValueError: more dimensions in the subspaces than in a token, or a share outside (0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        share: float = 0.5,
        eps: float = 1.0,
        enter: nn.Module | None = None,
    ) -> None:
        super().__init__(dim, num_heads, head_dim, eps=eps, enter=enter, orthonormal=True)
        self.share = nn.Parameter(torch.tensor(_logit(share)))

    @property
    def step_size(self) -> float:
        """Share of the longest proven step."""
        return self.share.sigmoid().item()

    @step_size.setter
    def step_size(self, value: float) -> None:
        _refuse_to_set(self, "step_size", "share")

    def forward(self, z: Float[Tensor, "b n d"], x: Tensor | None = None) -> Float[Tensor, "b n d"]:
        b = self.head_dim / (z.shape[-2] * self.eps**2)
        return z + (2 / b) * self.share.sigmoid() * self.direction(self.project(z))

    def max_step_size(self, num_tokens: int | None = None) -> float:
        return 1.0


class StrictISTA(SoftISTA):
    r"""ISTA on the plain LASSO, with step size and sparsity learned inside the bound of its descent.

    .. math:: \eta = \sigma(s)\, \frac{2}{\beta}, \qquad \beta \ge \|D\|^2

    with :math:`\beta` from :func:`spectral_bound`. Codes have either sign, so that CRATE's start, the token,
    is feasible.

    Args:
        dim, num_atoms, enter: see :class:`~pellucid.steps.ista.ISTA`.
        share: where the learned share :math:`\sigma(s)` begins.
        sparsity: where the learned price of one unit of code begins.

    Raises:
        ValueError: a share outside (0, 1), or a sparsity that is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_atoms: int | None = None,
        *,
        share: float = 0.25,
        sparsity: float = 0.1,
        enter: nn.Module | None = None,
    ) -> None:
        super().__init__(dim, num_atoms, enter=enter)
        if sparsity <= 0:
            raise ValueError(f"sparsity is {sparsity}; a learned price begins above 0")
        self.share = nn.Parameter(torch.tensor(_logit(share)))
        self.log_sparsity = nn.Parameter(torch.tensor(math.log(sparsity)))
        self._bound, self._change = Kept(), Kept()

    @property
    def step_size(self) -> float:
        """Share of the longest proven step."""
        return self.share.sigmoid().item()

    @step_size.setter
    def step_size(self, value: float) -> None:
        _refuse_to_set(self, "step_size", "share")

    @property
    def sparsity(self) -> float:
        """The learned price."""
        return self.log_sparsity.exp().item()

    @sparsity.setter
    def sparsity(self, value: float) -> None:
        _refuse_to_set(self, "sparsity", "log_sparsity")

    def forward(self, z: Float[Tensor, "b n m"], x: Tensor | None = None) -> Float[Tensor, "b n m"]:
        D = self.dictionary
        keep = is_inference(z, D)
        bound = self._bound(lambda: spectral_bound(D), (D,)) if keep else spectral_bound(D)
        eta = self.share.sigmoid() * 2 / bound
        if x is None:
            self.check_complete()
            change = self._change(lambda: D - D.mT @ D, (D,)) if keep else D - D.mT @ D
            moved = z + z @ (eta * change).to(z.dtype)
        else:
            moved = z + eta.to(z.dtype) * ((x - z @ D.mT) @ D)
        threshold = (eta * self.log_sparsity.exp()).to(z.dtype)
        return F.softshrink(moved / threshold, 1.0) * threshold

    def max_step_size(self, num_tokens: int | None = None) -> float:
        return 1.0


def spectral_bound(matrix: Float[Tensor, "d m"], squarings: int = 5) -> Float[Tensor, ""]:
    r"""What :math:`\|M\|_2^2` never exceeds, and falls short of by at most a factor :math:`r^{2^{-6}}`.

    .. math:: \|G\|_2 \le \|G^{2^k}\|_F^{2^{-k}}, \qquad G = M^\top M

    from the smaller Gram matrix, of side r, by k squarings: 1.07 for r = 64, 1.11 for r = 768. Products only,
    so it costs no decomposition and has a gradient everywhere. Power iteration, the usual choice, gives a
    lower bound, which would guarantee nothing.
    """
    with full_precision(matrix):
        wide = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
        gram = wide @ wide.mT if wide.shape[0] <= wide.shape[1] else wide.mT @ wide
        log_norm = torch.zeros((), dtype=gram.dtype, device=gram.device)
        for k in range(squarings):
            size = torch.linalg.matrix_norm(gram)
            log_norm = log_norm + size.log() / 2**k
            gram = gram / size
            gram = gram @ gram
        return (log_norm + torch.linalg.matrix_norm(gram).log() / 2**squarings).exp()


def _refuse_to_set(step: nn.Module, constant: str, parameter: str) -> None:
    """What is a constant of the parent is learnt here; only the parent's constructor may pass by."""
    if parameter in step._parameters:
        raise AttributeError(f"{constant} of {type(step).__name__} is learnt - set its parameter {parameter}")


def _logit(share: float) -> float:
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; it must lie between 0 and 1, where descent is proved")
    return math.log(share / (1 - share))
