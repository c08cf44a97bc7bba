"""The audit: for each layer and each image or text, did the step lower the objective it was derived from?

Before and after are measured with the step's own parameters and on the step's own scale, so that a growing
residual cannot fake a change. Black-box models have no objective to hold them to; the columns that mean
something for any tokens are filled for them too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.errors import DataError, NumericsError
from pellucid.measure.watch import Sighting, arguments, input_batches, is_white_box, watch
from pellucid.models.language import LanguageModel
from pellucid.models.modes import in_eval_mode
from pellucid.objectives import coding_rate, nonzero_fraction
from pellucid.steps import ISTA, OvercompleteISTA, Step, SubspaceStep

RATE_EPS = 0.1
"""Distortion of the coding rate of unit tokens, as in the authors' own layer-wise plots (eps^2 = 0.01)."""

RANK_TOLERANCE = 0.01
"""Singular values below this share of the largest do not count."""

OUTLIER_NORM = 3.0
"""A token is an outlier when its norm exceeds this many times the median of its image or text."""

SHARE = 0.99
"""A step descends when its objective fell on at least this share of the images or texts."""


ROW_KEYS = (
    "layer",
    "step",
    "objective",
    "before",
    "after",
    "descended",
    "coding_rate",
    "nonzero",
    "rank",
    "coherence",
    "outliers",
    "step_size",
    "max_step_size",
)


@dataclass(frozen=True)
class Audit:
    """What each layer did.

    Attributes:
        model: its name.
        data: what was looked at.
        samples: number of images or texts.
        rows: one dict for each step in order, with ``layer`` (from 1), ``step``, ``objective`` (its name),
            ``before`` and ``after`` (means over samples), ``descended`` (share of samples on which it fell),
            ``coding_rate`` (nats, of unit tokens), ``nonzero`` (share of entries that are not exactly zero;
            of the code, where it is spoken back),
            ``rank`` (of the tokens, mean), ``coherence`` (largest cosine between two subspaces, or between
            two atoms), ``outliers`` (share of high-norm tokens), ``step_size`` and ``max_step_size`` (descent
            is guaranteed below it from a feasible start; None where it is only measured).
        verdict: ``descends`` (True, False, or None without objectives), ``text``, ``details``.
        spectra: mean singular values of the tokens after each step, largest first.
        norms: histogram of token norms, relative to the median of each sample, after each step; ``mean`` is
            their mean as they are.
        unit: what a sample is called, ``images`` or ``texts``.
    """

    model: str
    data: str
    samples: int
    rows: list[dict[str, Any]]
    verdict: dict[str, Any]
    spectra: list[dict[str, Any]] = field(default_factory=list)
    norms: list[dict[str, Any]] = field(default_factory=list)
    unit: str = "images"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self, path: str | Path) -> None:
        """Written as UTF-8 JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def table(self) -> str:
        """The rows as text for a terminal."""
        return _table(self.rows)


def audit(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    data: str = "",
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Audit:
    """Hold every layer to its objective.

    Args:
        model: CRATE or any model made of steps, or a timm ViT.
        batches: images ``(b, c, h, w)`` as the model takes them, for a language model batches of text or
            words by their numbers; or tuples that begin with them. Padding is left out.
        data: what to call what is looked at.
        limit: look at no more than so many.
        progress: called with the number of images or texts after each batch.

    Raises:
        DataError: nothing to look at.
        ConfigError: a model that cannot be looked into.
        NumericsError: tokens that are not finite, naming the step that made them.
    """
    device = next(model.parameters()).device
    looks: dict[tuple[int, str], _Look] = {}
    reads = isinstance(model, LanguageModel)
    unit = "texts" if reads else "images"

    def see(sighting: Sighting) -> None:
        for real in _unpadded(sighting):
            if not bool(real.tokens.isfinite().all()):
                where = f"layer {sighting.layer} {sighting.name}"
                scale = "" if reads else ", and at the images' scale"
                raise NumericsError(
                    f"tokens hold NaN or infinity after {where} - look at the model's weights{scale}"
                )
            looks.setdefault((sighting.layer, sighting.name), _Look(real)).add(real)

    samples = 0
    with in_eval_mode(model):
        for inputs in input_batches(batches, device, limit):
            watch(model, inputs, see)
            count = len(arguments(inputs)[0])
            samples += count
            if progress is not None:
                progress(count)
    if not samples:
        raise DataError(f"no {unit} to audit - give at least one batch")
    rows = [look.row() for look in looks.values()]
    return Audit(
        model=getattr(model, "architecture", type(model).__name__),
        data=data,
        samples=samples,
        rows=rows,
        verdict=verdict(rows, unit) if is_white_box(model) else _black_box_verdict(),
        spectra=[look.spectrum() for look in looks.values()],
        norms=[look.norm_histogram() for look in looks.values()],
        unit=unit,
    )


def verdict(rows: list[dict[str, Any]], unit: str = "images") -> dict[str, Any]:
    """The rows in words: which steps descend, which do not, and which are beyond their bound."""
    held = [row for row in rows if row["objective"] is not None]
    failing = [row for row in held if row["descended"] < SHARE]
    details = [_failure(row, unit) for row in failing]
    details += [
        f"layer {row['layer']} {row['step']}: step size {row['step_size']:.3g} is beyond the bound "
        f"{row['max_step_size']:.3g} up to which descent is guaranteed"
        for row in held
        if row["max_step_size"] is not None and row["step_size"] >= row["max_step_size"]
    ]
    share = f"{SHARE:.0%} of the {unit}"
    if not failing:
        text = f"All {len(held)} steps lower their objective on at least {share}."
    else:
        text = f"{len(held) - len(failing)} of {len(held)} steps lower their objective on at least {share}."
    return {"descends": not failing, "text": text, "details": details}


def _unpadded(sighting: Sighting) -> Iterator[Sighting]:
    """The same without padding, texts of one length at a time: each is measured over its own tokens."""
    record = sighting.record
    if record is None or record.real is None:
        yield sighting
        return
    lengths = record.real.sum(1)
    for length in lengths.unique().tolist():
        keep = record.real & (lengths == length)[:, None]

        def cut(tokens: Tensor, keep: Tensor = keep, length: int = length) -> Tensor:
            return tokens[keep].unflatten(0, (-1, length))

        x = None if record.x is None else cut(record.x)
        alone = replace(record, z=cut(record.z), z_next=cut(record.z_next), x=x, real=None)
        yield Sighting(sighting.layer, sighting.name, cut(sighting.tokens), alone)


class _Look:
    """What has been seen of one step, sample by sample."""

    def __init__(self, first: Sighting) -> None:
        self.layer, self.name = first.layer, first.name
        record = first.record
        self.step: Step | None = record.step if record is not None and record.step.objective_name else None
        self.num_tokens = first.tokens.shape[-2]
        self.values: dict[str, list[Tensor]] = {}
        self.norms: list[Tensor] = []
        self.singular: list[Tensor] = []

    def add(self, sighting: Sighting) -> None:
        tokens = sighting.tokens.float()
        record = sighting.record
        self.num_tokens = min(self.num_tokens, tokens.shape[-2])  # the bound that holds for all
        if record is not None and self.step is not None:
            before, after = record.before_and_after()
            self._keep("before", before)
            self._keep("after", after)
        singular = singular_values(tokens)
        norms = tokens.norm(dim=-1)
        relative = norms / norms.median(-1, keepdim=True).values.clamp_min(1e-12)
        self._keep("norm", norms.mean(-1))
        self._keep("coding_rate", coding_rate(F.normalize(tokens, dim=-1), RATE_EPS))
        code = tokens
        if record is not None and isinstance(record.step, OvercompleteISTA):
            code = record.step.code(record.z)  # sparse before it is spoken back, not after
        self._keep("nonzero", nonzero_fraction(code))
        self._keep("rank", (singular > RANK_TOLERANCE * singular[..., :1]).sum(-1).float())
        self._keep("outliers", (relative > OUTLIER_NORM).float().mean(-1))
        self.singular.append(singular.cpu())
        self.norms.append(relative.cpu())

    def row(self) -> dict[str, Any]:
        seen = {key: torch.cat(parts).double() for key, parts in self.values.items()}
        means = {key: value.mean().item() for key, value in seen.items()}
        step = self.step
        return {
            "layer": self.layer,
            "step": self.name,
            "objective": step.objective_name if step is not None else None,
            "before": means.get("before"),
            "after": means.get("after"),
            "descended": (seen["after"] < seen["before"]).double().mean().item()
            if step is not None
            else None,
            "coding_rate": means["coding_rate"],
            "nonzero": means["nonzero"],
            "rank": means["rank"],
            "coherence": coherence(step) if step is not None else None,
            "outliers": means["outliers"],
            "step_size": step.step_size if step is not None else None,
            "max_step_size": step.max_step_size(self.num_tokens) if step is not None else None,
        }

    def spectrum(self) -> dict[str, Any]:
        widest = max(values.shape[-1] for values in self.singular)
        padded = [F.pad(values, (0, widest - values.shape[-1])) for values in self.singular]
        values = torch.cat(padded).mean(0).tolist()
        return {"layer": self.layer, "step": self.name, "singular_values": values}

    def norm_histogram(self, bins: int = 24) -> dict[str, Any]:
        relative = torch.cat([norms.flatten() for norms in self.norms])
        top = max(2.0, float(relative.max()))
        counts = torch.histc(relative, bins, 0, top).long().tolist()
        edges = torch.linspace(0, top, bins + 1).tolist()
        mean = torch.cat(self.values["norm"]).double().mean().item()
        return {"layer": self.layer, "step": self.name, "edges": edges, "counts": counts, "mean": mean}

    def _keep(self, key: str, values: Tensor) -> None:
        self.values.setdefault(key, []).append(values.cpu())


def singular_values(tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b r"]:
    """Singular values of each sample's tokens, largest first, from the smaller Gram matrix.

    Values below about 1e-3 of the largest are round-off; the audit reads none that small.
    """
    n, d = tokens.shape[-2:]
    gram = tokens @ tokens.mT if n < d else tokens.mT @ tokens
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(-1)


def coherence(step: Step) -> float | None:
    """How far from orthogonal: the largest cosine between two subspaces of a step, or between two atoms."""
    with torch.no_grad():
        if isinstance(step, SubspaceStep):
            bases = torch.linalg.qr(step.U.float()).Q
            cosines = torch.einsum("jdp,kdq->jkpq", bases, bases)
            largest = torch.linalg.matrix_norm(cosines, 2)
        elif isinstance(step, ISTA | OvercompleteISTA):
            atoms = F.normalize(step.dictionary.float(), dim=0)
            largest = (atoms.mT @ atoms).abs()
        else:
            return None
    if len(largest) < 2:
        return None
    return largest.fill_diagonal_(0).max().clamp_max(1).item()


def _failure(row: dict[str, Any], unit: str) -> str:
    where = f"layer {row['layer']} {row['step']}"
    change = f"{row['before']:.4g} -> {row['after']:.4g}"
    name, share = row["objective"], f"{row['descended']:.1%} of {unit}"
    if row["after"] >= row["before"]:
        verb = "raises" if row["after"] > row["before"] else "does not change"
        return f"{where} {verb} {name} on average: {change}, falls on {share}"
    return f"{where} lowers {name} on average, {change}, but only on {share}"


def _black_box_verdict() -> dict[str, Any]:
    text = "This model states no objective for its layers, so there is nothing to hold them to."
    return {"descends": None, "text": text, "details": []}


_COLUMNS = {
    "layer": "d",
    "step": "s",
    "objective": "s",
    "before": ".4g",
    "after": ".4g",
    "descended": ".1%",
    "coding_rate": ".1f",
    "nonzero": ".1%",
    "rank": ".1f",
    "coherence": ".2f",
    "outliers": ".2%",
}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [[name.replace("_", " ") for name in _COLUMNS]]
    lines += [[_cell(row[name], form) for name, form in _COLUMNS.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)
