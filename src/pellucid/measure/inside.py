"""One input followed through a model: where its tokens go, and what one layer does with each of them.

The tokens of an image are class token, registers and patches; those of a text are its words. Both kinds of
model are watched in the same way, so nothing here asks which it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.errors import ConfigError
from pellucid.measure.audit import RANK_TOLERANCE, RATE_EPS, singular_values
from pellucid.measure.cache import run_with_cache
from pellucid.measure.watch import Sighting, has_steps, watch
from pellucid.models.modes import in_eval_mode
from pellucid.objectives import coding_rate, nonzero_fraction
from pellucid.steps import ISTA, TSSA, OvercompleteISTA, StepRecord, SubspaceStep

ATOM_BINS = 40
"""Of the histogram of cosines between atoms."""


@dataclass(frozen=True)
class Path:
    """The tokens of one input at every point: in front of the first layer, then after each step.

    Attributes:
        points: ``(layer, step)`` of each point, the first ``(0, "embedding")``.
        norms: length of each token.
        turned: cosine of each token with itself one point before; 1 at the first.
        moved: how far it came from there, in its own lengths; 0 at the first.
        places: each token at unit length, on the two directions in which those of all points differ most.
        shares: of the variance that these two hold.
        steps: one dict for each step with ``layer``, ``step``, ``objective``, ``before`` and ``after`` (as in
            the audit, of this input alone), ``coding_rate``, ``nonzero``, ``rank``, ``singular_values``.
    """

    points: list[tuple[int, str]]
    norms: Float[Tensor, "P n"]
    turned: Float[Tensor, "P n"]
    moved: Float[Tensor, "P n"]
    places: Float[Tensor, "P n 2"]
    shares: tuple[float, float]
    steps: list[dict[str, Any]]


@dataclass(frozen=True)
class LayerView:
    """What one layer does with one input. Fields that it does not have are None.

    Attributes:
        before, between, after: tokens in front of the layer, between its steps, after it.
        attention: weights, ``[head, query, key]``; rows sum to one.
        membership: of ToST, how much each token belongs to each head; over heads it sums to one.
        projection: coordinates ``U_k^T z`` of each token in each subspace.
        energy: share of a token's squared length that lies in each subspace, 0 to 1.
        code: sparse code of each token, or what an MLP's non-linearity gives.
    """

    before: Float[Tensor, "n d"]
    between: Float[Tensor, "n d"] | None
    after: Float[Tensor, "n d"]
    attention: Float[Tensor, "K n n"] | None = None
    membership: Float[Tensor, "K n"] | None = None
    projection: Float[Tensor, "K n p"] | None = None
    energy: Float[Tensor, "K n"] | None = None
    code: Float[Tensor, "n m"] | None = None


def steps_of(model: Any) -> list[dict[str, Any]]:
    """What can be said of each step from weights alone, in order.

    Dicts with ``layer`` (from 1), ``step``, ``kind`` (its class), ``objective``, ``heads``, ``head_dim``,
    ``atoms``; of subspaces ``overlap`` (K, K), the largest cosine between any two, and ``basis`` (K, p), the
    singular values of each U_k; of a dictionary ``cosines``, how many pairs of atoms have which absolute
    cosine, in 40 bins from 0 to 1, and ``singular_values``, its own.

    Raises:
        ConfigError: a model that cannot be looked into.
    """
    if has_steps(model):
        layers = getattr(model, "layers", [])
        return [
            {"layer": layer, "step": name, **_weights(step)}
            for layer, steps in enumerate(layers, start=1)
            for name, step in steps.items()
        ]
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise ConfigError(
            f"cannot look inside {type(model).__name__}: it has neither white-box steps nor transformer "
            f"blocks - take CRATE or a timm ViT"
        )
    found = []
    for layer, block in enumerate(blocks, start=1):
        for name, part in (("attention", getattr(block, "attn", None)), ("mlp", getattr(block, "mlp", None))):
            heads = getattr(part, "num_heads", None)
            found.append(
                {
                    "layer": layer,
                    "step": name,
                    "kind": type(part).__name__,
                    "objective": None,
                    "heads": heads,
                    "head_dim": getattr(part, "head_dim", None),
                    "atoms": getattr(getattr(part, "fc1", None), "out_features", None),
                }
            )
    return found


@torch.no_grad()
def _weights(step: Any) -> dict[str, Any]:
    told = {
        "kind": type(step).__name__,
        "objective": step.objective_name,
        "step_size": float(step.step_size) if step.objective_name else None,
        "heads": getattr(step, "num_heads", None),
        "head_dim": getattr(step, "head_dim", None),
        "atoms": getattr(getattr(step, "fc1", None), "out_features", None),
    }
    if isinstance(step, SubspaceStep):
        bases = _bases(step)
        cosines = torch.einsum("jdp,kdq->jkpq", bases, bases)
        told["overlap"] = torch.linalg.matrix_norm(cosines, 2).clamp_max(1)
        told["basis"] = torch.linalg.svdvals(step.U.float())
    if isinstance(step, ISTA | OvercompleteISTA):
        dictionary = step.dictionary.detach().float()
        atoms = F.normalize(dictionary, dim=0)
        above = torch.ones(atoms.shape[1], atoms.shape[1], dtype=torch.bool).triu(1)
        cosines = (atoms.mT @ atoms).abs()[above.to(atoms.device)]
        told["atoms"] = dictionary.shape[1]
        told["sparsity"] = float(step.sparsity)
        told["cosines"] = torch.histc(cosines.clamp_max(1), ATOM_BINS, 0, 1).long().tolist()
        told["singular_values"] = torch.linalg.svdvals(dictionary)
    return told


def _bases(step: SubspaceStep) -> Float[Tensor, "K d p"]:
    """Orthonormal columns that span each subspace."""
    return torch.linalg.qr(step.U.float()).Q


@dataclass
class _Seen:
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, sighting: Sighting) -> None:
        record, tokens = sighting.record, sighting.tokens.float()
        row: dict[str, Any] = {"layer": sighting.layer, "step": sighting.name, "objective": None}
        row |= {"before": None, "after": None}
        code = tokens
        if record is not None:
            if record.step.objective_name is not None:
                before, after = record.before_and_after()
                row |= {
                    "objective": record.step.objective_name,
                    "before": before.item(),
                    "after": after.item(),
                }
            if isinstance(record.step, OvercompleteISTA):
                code = record.step.code(record.z)
        singular = singular_values(tokens)[0]
        row["coding_rate"] = coding_rate(F.normalize(tokens, dim=-1), RATE_EPS).item()
        row["nonzero"] = nonzero_fraction(code).item()
        row["rank"] = int((singular > RANK_TOLERANCE * singular[0]).sum())
        row["singular_values"] = singular.cpu()
        self.rows.append(row)


@torch.no_grad()
def follow(model: Any, inputs: Tensor) -> Path:
    """Follow one input, a batch of one, through all layers.

    Args:
        model: CRATE or any model made of steps, or a timm ViT.
        inputs: one image ``(1, c, h, w)``, or one text ``(1, n)`` of a language model.

    Raises:
        ConfigError: several inputs; a model that cannot be looked into.
    """
    _one(inputs)
    inputs = inputs.to(next(model.parameters()).device)
    seen = _Seen()
    points: list[tuple[int, str]] = [(0, "embedding")]
    states: list[Tensor] = []

    def see(sighting: Sighting) -> None:
        points.append((sighting.layer, sighting.name))
        states.append(sighting.tokens[0].float().cpu())
        seen(sighting)

    with in_eval_mode(model):
        watch(model, inputs, see)
    first = "blocks.0.hook_resid_pre"
    states.insert(0, run_with_cache(model, inputs, first)[1][first][0].float().cpu())
    tokens = torch.stack(states)  # P n d
    norms = tokens.norm(dim=-1)
    before = tokens[:-1]
    turned = F.cosine_similarity(tokens[1:], before, dim=-1)
    moved = (tokens[1:] - before).norm(dim=-1) / norms[:-1].clamp_min(1e-12)
    places, shares = _flattened(F.normalize(tokens, dim=-1))
    return Path(
        points=points,
        norms=norms,
        turned=torch.cat([torch.ones_like(turned[:1]), turned]),
        moved=torch.cat([torch.zeros_like(moved[:1]), moved]),
        places=places,
        shares=shares,
        steps=seen.rows,
    )


@torch.no_grad()
def look_into(model: Any, inputs: Tensor, layer: int) -> LayerView:
    """What layer ``layer`` (from 1) does with one input; arguments as :func:`follow`.

    Only this layer's attention weights are formed, so that a large model can be looked at layer by layer.

    Raises:
        ConfigError: several inputs; no such layer; a model that cannot be looked into.
    """
    _one(inputs)
    inputs = inputs.to(next(model.parameters()).device)
    ours = f"blocks.{layer - 1}."
    cache = run_with_cache(model, inputs, lambda name: name.startswith(ours))[1]
    if not cache:
        raise ConfigError(f"the model has no layer {layer}")

    def found(name: str) -> Tensor | None:
        value = cache.get(ours + name)
        return None if value is None else value[0].float().cpu()

    before, after = found("hook_resid_pre"), found("hook_resid_post")
    assert before is not None
    assert after is not None
    code = found("mlp.hook_post")
    own: dict[str, Tensor | None] = {"membership": None, "projection": None, "energy": None}

    def see(sighting: Sighting) -> None:
        record = sighting.record
        if record is not None and sighting.layer == layer and isinstance(record.step, SubspaceStep):
            own.update(_in_subspaces(record))

    if has_steps(model):
        with in_eval_mode(model):
            watch(model, inputs, see)
    return LayerView(
        before=before,
        between=found("hook_resid_mid"),
        after=after,
        attention=found("attn.hook_pattern"),
        code=code,
        **own,
    )


def _in_subspaces(record: StepRecord) -> dict[str, Tensor]:
    step, z = record.step, record.z
    assert isinstance(step, SubspaceStep)
    w = step.project(z)
    tokens = step.norm(z)[0].float()
    inside = torch.einsum("nd,kdp->knp", tokens, _bases(step)).square().sum(-1)
    energy = inside / tokens.square().sum(-1).clamp_min(1e-24)
    told = {"projection": w[0].float().cpu(), "energy": energy.clamp_max(1).cpu()}
    if isinstance(step, TSSA):
        told["membership"] = step.membership(w)[0].float().cpu()
    return told


def _flattened(tokens: Float[Tensor, "P n d"]) -> tuple[Float[Tensor, "P n 2"], tuple[float, float]]:
    """The two principal directions of all tokens at all points, and their shares of the variance."""
    rows = tokens.flatten(0, 1).double()
    rows = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(rows.mT @ rows)
    axes = vectors[:, -2:].flip(-1)
    # An eigenvector has no sign of its own: its largest entry is made positive, so that runs agree.
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    places = (rows @ (axes * largest.sign())).float().unflatten(0, tokens.shape[:2])
    total = values.sum().clamp_min(1e-24)
    first, second = (values[-2:].flip(0) / total).clamp(0, 1).tolist()
    return places, (first, second)


def _one(inputs: Tensor) -> None:
    if len(inputs) != 1:
        raise ConfigError(f"{len(inputs)} inputs - look at one at a time")


__all__ = ["LayerView", "Path", "follow", "look_into", "steps_of"]
