r"""Learning without labels: views of an image agree, features of all images spread (Wu et al. 2025, SimDINO).

.. math::
    -\frac1{|P|} \sum_{(i, j) \in P} \langle t_i, s_j \rangle - \gamma\, R(Z; \epsilon),

with t from a teacher that is the student's moving average, s from the student, P the pairs of different
views, and R the coding rate. Agreement alone is best served by one feature for everything; the coding rate,
which is largest when features fill all directions alike, forbids it. Prototypes, centring and temperatures,
which keep DINO from that end, have no place left.

**The loss is a function of (eps, gamma, group_size).** The published program sums the moments of the samples
on one device and divides by those on all: its effective distortion grows with the number of devices, and so
does what it learns (:func:`published_constants`).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from pellucid.objectives.coding_rate import coding_rate


def alignment(student: Float[Tensor, "v b d"], teacher: Float[Tensor, "g b d"]) -> Float[Tensor, ""]:
    """Mean cosine of the teacher's view i and the student's view j of one image, over all j other than i.

    Args:
        student: features of all views; the first g of them are the teacher's.
        teacher: features of the global views.

    Raises:
        ValueError: no pair of different views, or shapes that do not fit.
    """
    views, batch, dim = student.shape
    seen = len(teacher)
    if teacher.shape[1:] != (batch, dim) or seen > views:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} do not fit: expected "
            f"(views, batch, dim) and (global views, batch, dim)"
        )
    pairs = seen * views - seen
    if pairs < 1:
        raise ValueError("one view has no other to agree with - give at least two")
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    # Over all pairs at once: sums first, products after, less the pairs of a view with itself.
    everyone = (teacher.sum(0) * student.sum(0)).sum()
    itself = (teacher * student[:seen]).sum()
    return (everyone - itself) / (pairs * batch)


def expansion(
    features: Float[Tensor, "g b d"], eps: float, group_size: int | None = None
) -> Float[Tensor, ""]:
    r"""Coding rate of the features of each view, in nats: mean over views, and over groups of the batch.

    Args:
        features: of the global views.
        eps: distortion.
        group_size: samples that are coded together, all unless given; divides the batch.

    Raises:
        ValueError: a batch that does not fall into whole groups.
    """
    batch = features.shape[1]
    size = batch if group_size is None else group_size
    if size < 1 or batch % size:
        raise ValueError(f"a batch of {batch} does not fall into groups of {size} - take a divisor")
    with torch.autocast(features.device.type, enabled=False):
        return coding_rate(features.float().unflatten(1, (-1, size)), eps).mean()


def simdino(
    student: Float[Tensor, "v b d"],
    teacher: Float[Tensor, "g b d"],
    *,
    eps: float,
    gamma: float,
    group_size: int | None = None,
    expand_teacher: bool = True,
) -> dict[str, Tensor]:
    """The loss with its parts: ``alignment`` (mean cosine), ``rate`` (nats), ``expansion`` (gamma times it).

    Args:
        student: unit features of all views, ``(views, batch, dim)``; the first are the teacher's.
        teacher: unit features of the global views, without gradient.
        eps, group_size: see :func:`expansion`.
        gamma: weight of the rate.
        expand_teacher: rate of the mean of student and teacher, as published; else of the student alone.
    """
    agree = alignment(student, teacher)
    seen = student[: len(teacher)]
    rate = expansion((seen + teacher) / 2 if expand_teacher else seen, eps, group_size)
    return {"loss": -agree - gamma * rate, "alignment": agree, "rate": rate, "expansion": gamma * rate}


def masked_alignment(
    student: Float[Tensor, "m d"], teacher: Float[Tensor, "m d"], mask: Bool[Tensor, "b p"]
) -> Float[Tensor, ""]:
    """Mean cosine of what student and teacher see in hidden patches: SimDINOv2's second part.

    Mean over the hidden patches of an image, then over all images as published, where one that hides none
    counts as 0: a mean over those that hide any would change with the split of the batch.

    Args:
        student: features of the hidden patches, in the order in which ``mask`` names them.
        teacher: the same, of the teacher, who sees the patches.
        mask: true where a patch is hidden from the student.
    """
    weights = (1 / mask.sum(-1, keepdim=True).clamp_min(1)).expand_as(mask)[mask] / len(mask)
    cosine = (F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)).sum(-1)
    return (weights * cosine).sum()


def dino(
    student: Float[Tensor, "v b k"],
    teacher: Float[Tensor, "g b k"],
    centre: Float[Tensor, " k"],
    *,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Float[Tensor, ""]:
    r"""Cross-entropy of prototypes between views, in nats (Caron et al. 2021).

    .. math:: -\frac1{|P|} \sum_{(i, j) \in P} \mathrm{softmax}((t_i - c) / \tau_t) \cdot
        \log \mathrm{softmax}(s_j / \tau_s)

    Centring keeps one prototype from taking everything, the low temperature keeps all from being alike.

    Args:
        student: scores of k prototypes for all views; the first g are the teacher's.
        teacher: scores of the global views, without gradient.
        centre: running mean of the teacher's scores.
        student_temperature, teacher_temperature: :math:`\tau_s` and :math:`\tau_t`.
    """
    seen, pairs = len(teacher), len(teacher) * len(student) - len(teacher)
    if pairs < 1:
        raise ValueError("one view has no other to agree with - give at least two")
    target = ((teacher.float() - centre) / teacher_temperature).softmax(-1)
    guess = (student.float() / student_temperature).log_softmax(-1)
    # Over all pairs at once, less the pairs of a view with itself, as in :func:`alignment`.
    everyone = (target.sum(0) * guess.sum(0)).sum()
    itself = (target * guess[:seen]).sum()
    return -(everyone - itself) / (pairs * student.shape[1])


def published_constants(
    dim: int = 256, *, devices: int = 8, local_batch: int = 64, eps_squared: float = 0.05
) -> dict[str, float | int]:
    r"""What (eps, gamma, group_size) the published program's flags amount to.

    Its ``eps`` is a square, its moments are of ``local_batch`` samples divided by those of all N devices, and
    its gamma follows the whole batch n: :math:`\epsilon^2 = N \epsilon_{flag}`, :math:`\gamma = 1/d + 1/n`.
    The defaults are those of the published run.
    """
    batch = devices * local_batch
    return {
        "eps": (devices * eps_squared) ** 0.5,
        "gamma": (dim + batch) / (dim * batch),
        "group_size": local_batch,
    }
