"""A student that agrees with its own moving average over views of an image: SimDINO, SimDINOv2 and DINO."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pellucid.data import Crops, Masking
from pellucid.errors import ConfigError
from pellucid.models.embed import patch_grid
from pellucid.objectives import dino, masked_alignment, rate_ceiling, simdino
from pellucid.objectives.self_distillation import published_constants
from pellucid.training.config import TrainConfig
from pellucid.training.objective import all_finite
from pellucid.training.ranks import averaged, gathered, local
from pellucid.training.recipe import cosine
from pellucid.training.representation import Representation, feature_width, hidden

PUBLISHED_HEAD = {"head_dim": 256, "head_hidden": 2048}
GROUP = 64
"""Images coded together, as many as on one device of the published run."""


class SelfDistillation(Representation):
    """What the three share: two networks, and views that both or one of them sees.

    The teacher is the exponential moving average of the student and sees the large crops only. It moves with
    every optimiser step, with a momentum that rises along half a cosine from ``momentum`` to 1, and it is
    what the run hands over.

    Args:
        model: images of any size to features.
        head: features to the space in which views are compared.
        momentum: of the teacher, at the start.
        stop_gradient: False trains both as one.
        more: further modules that are trained and not handed over.
    """

    many_views: ClassVar[bool] = True
    recipe: ClassVar[Mapping[str, Any]] = {"lr": 1e-3, "batch_size": 64}
    progress: Tensor

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        *,
        momentum: float,
        stop_gradient: bool,
        more: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__(model, {"projector": head, **(more or {})})
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum is {momentum}; it must lie in 0..1")
        self.momentum, self.stop_gradient = momentum, stop_gradient
        self.teacher = nn.ModuleDict({"model": copy.deepcopy(model), "projector": copy.deepcopy(head)})
        self.teacher.requires_grad_(False)
        self.register_buffer("progress", torch.zeros(()))  # share of the run that lies behind
        self.train()

    @classmethod
    def options(cls) -> dict[str, Any]:
        return {**super().options(), "preset": Literal["published"]}

    @property
    def student(self) -> dict[str, nn.Module]:
        """The two that the teacher follows."""
        return {"model": self.model, "projector": self.heads["projector"]}

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teacher.eval()  # it answers, and is not to guess: no dropout, running moments in a BatchNorm
        return self

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        momentum = cosine(self.momentum, 1.0, step, total)
        for name, module in self.student.items():
            ours, theirs = module.state_dict(), self.teacher[name].state_dict()
            floats = [key for key, value in theirs.items() if value.is_floating_point()]
            moved, towards = ([local(state[key]) for key in floats] for state in (theirs, ours))
            torch._foreach_lerp_(moved, towards, 1 - momentum)
            for key in theirs.keys() - set(floats):
                theirs[key].copy_(ours[key])
        self.progress.fill_((step + 1) / total)

    def handed_over(self) -> Mapping[str, Tensor]:
        return self.teacher["model"].state_dict()

    def student_views(self, crops: Crops) -> Float[Tensor, "v b k"]:
        """All views behind the head, large ones first."""
        seen = [crops.large, crops.small] if crops.small.shape[1] else [crops.large]
        return torch.cat([_of_views(self.student, views) for views in seen])

    def teacher_views(self, crops: Crops) -> Float[Tensor, "g b k"]:
        """The large views, as the teacher puts them."""
        with torch.set_grad_enabled(not self.stop_gradient and torch.is_grad_enabled()):
            return _of_views(self.teacher if self.stop_gradient else self.student, crops.large)


class SimDINO(SelfDistillation):
    r"""Views of an image agree, features of all images spread: no prototypes, centring or temperatures.

    The loss is :func:`~pellucid.objectives.simdino`, a function of (eps, gamma, group_size), on the unit
    sphere behind a projector that is thrown away. With ``patches``, agreement on hidden patches joins it:
    SimDINOv2.

    A batch that is cut over devices or micro-batches is coded in the same groups: a device takes whole
    groups, and where a group is larger than a device's share, features are gathered from all.

    Args:
        model: images of any size to features.
        eps: distortion of the coding rate.
        gamma: weight of the rate, which is in nats.
        group_size: images that are coded together; divides the batch.
        head_dim: dimension in which views are compared.
        head_hidden: width of the projector's two hidden layers.
        momentum: of the teacher, at the start.
        expand_teacher: rate of the mean of student and teacher, as published; else of the student alone.
        patches: weight of the agreement on hidden patches; 0 hides none.
        stop_gradient: False trains student and teacher as one. For the study of collapse.

    Raises:
        ConfigError: a number out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eps: float,
        gamma: float,
        group_size: int,
        head_dim: int = 256,
        head_hidden: int = 2048,
        momentum: float = 0.996,
        expand_teacher: bool = True,
        patches: float = 0.0,
        stop_gradient: bool = True,
    ) -> None:
        if not eps > 0:
            raise ConfigError(f"eps is {eps}; the distortion must be larger than 0")
        if min(gamma, patches) < 0:
            raise ConfigError(f"gamma {gamma} and patches {patches} must not be negative")
        if group_size < 1:
            raise ConfigError(f"group_size is {group_size}; at least one image is coded")
        super().__init__(
            model,
            Projector(feature_width(model), head_hidden, head_dim),
            momentum=momentum,
            stop_gradient=stop_gradient,
            more={"mask": MaskToken(feature_width(model))} if patches else None,
        )
        self.eps, self.gamma, self.group_size = eps, gamma, group_size
        self.expand_teacher, self.patches = expand_teacher, patches

    @classmethod
    def resolved(cls, model: nn.Module, config: TrainConfig, steps: int) -> dict[str, Any]:
        """The paper's gamma, 1/dim + 1/n, for n images coded together: 64, or all where 64 does not divide.

        Projector and momentum go by the model's width and the run's length. ``preset="published"`` takes the
        numbers that the published run amounts to, whatever its flags say; their rate weighs four times less,
        which in short runs of small models is too little to keep features apart.
        """
        asked = dict(config.objective_args)
        preset = asked.pop("preset", None)
        at_once = config.batch_size // config.accumulate
        if preset is None:
            sizes = {**head_sizes(model), "group_size": at_once if at_once % GROUP else GROUP, **asked}
            gamma = 1 / max(1, sizes["head_dim"]) + 1 / max(1, sizes["group_size"])
            found = {"eps": 0.5, "gamma": gamma, "momentum": slow(steps), **sizes}
        else:
            found = {**PUBLISHED_HEAD, **published_constants(), "momentum": 0.996, **asked}
        if at_once % max(1, found["group_size"]):
            raise ConfigError(
                f"group_size {found['group_size']} does not divide the {at_once} images seen at once - "
                f"change batch_size, accumulate or group_size"
            )
        return found

    @property
    def masking(self) -> Masking | None:
        return Masking(patch_grid(self.model)) if self.patches else None

    def forward(self, crops: Crops, labels: Int[Tensor, b] | None = None) -> dict[str, Tensor]:
        masked = None
        if self.patches:
            student, teacher, masked = self._with_patches(crops)
        else:
            student, teacher = self.student_views(crops), self.teacher_views(crops)
        size = student.shape[1]
        if size % self.group_size:
            student, teacher = gathered(student, 1), gathered(teacher, 1)
        student, teacher = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
        if not all_finite(student, teacher):
            return {"loss": student.sum() + teacher.sum()}
        parts = simdino(
            student,
            teacher,
            eps=self.eps,
            gamma=self.gamma,
            group_size=self.group_size,
            expand_teacher=self.expand_teacher,
        )
        rate, ceiling = parts["rate"].detach(), rate_ceiling(self.group_size, student.shape[-1], self.eps)
        found = {
            "loss": parts["loss"],
            "alignment": parts["alignment"].detach(),
            "rate": rate,
            "rate share": rate / ceiling,
            "agreement": (student[: len(teacher)] * teacher).sum(-1).mean().detach(),
        }
        if masked is not None:
            found |= {"loss": parts["loss"] - self.patches * masked, "patches": masked.detach()}
        return found

    def _with_patches(self, crops: Crops) -> tuple[Tensor, Tensor, Tensor]:
        """Student's and teacher's views, and how far they agree on the patches hidden from the student."""
        mask = crops.mask.transpose(0, 1).flatten(0, 1)
        with hidden(self.model, mask, self.heads["mask"].get_parameter("token")):
            student, seen = _with_tokens(self.student, crops.large, mask)
        if crops.small.shape[1]:
            student = torch.cat([student, _of_views(self.student, crops.small)])
        with torch.set_grad_enabled(not self.stop_gradient and torch.is_grad_enabled()):
            pair = self.teacher if self.stop_gradient else self.student
            teacher, shown = _with_tokens(pair, crops.large, mask)
        return student, teacher, masked_alignment(seen.float(), shown.float(), mask)


class SimDINOv2(SimDINO):
    """SimDINO with hidden patches. Give the model registers (``--model-arg reg_tokens=4``), as published."""

    @classmethod
    def resolved(cls, model: nn.Module, config: TrainConfig, steps: int) -> dict[str, Any]:
        return {"patches": 1.0, **super().resolved(model, config, steps)}


class DINO(SelfDistillation):
    """Self-distillation over prototypes, kept from collapse by centring and temperatures (Caron et al. 2021).

    The baseline: what SimDINO does without. Prototypes are held fixed for the first hundredth of the run, as
    the published ones are for the first epoch; the teacher's temperature rises over the first three tenths.

    Args:
        model: images of any size to features.
        prototypes: number of them; 65,536 published, for a million images.
        head_dim: dimension in front of the prototypes.
        head_hidden: width of the projector's two hidden layers.
        momentum: of the teacher, at the start.
        centre_momentum: of the running mean of the teacher's scores; 1 leaves it at 0.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's, at the start and after its rise.
        stop_gradient: False trains student and teacher as one. For the study of collapse.

    Raises:
        ConfigError: a number out of its range.
    """

    centre: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        prototypes: int = 65536,
        head_dim: int = 256,
        head_hidden: int = 2048,
        momentum: float = 0.996,
        centre_momentum: float = 0.9,
        student_temperature: float = 0.1,
        teacher_temperature: tuple[float, float] | list[float] = (0.04, 0.07),
        stop_gradient: bool = True,
    ) -> None:
        if len(teacher_temperature) != 2 or not min(student_temperature, *teacher_temperature) > 0:
            raise ConfigError(
                f"temperatures are {student_temperature} and {teacher_temperature}; expected one and two "
                f"numbers larger than 0"
            )
        if prototypes < 2:
            raise ConfigError(f"prototypes is {prototypes}; there must be two to choose from")
        if not 0 <= centre_momentum <= 1:
            raise ConfigError(f"centre_momentum is {centre_momentum}; it must lie in 0..1")
        head = nn.Sequential(
            Projector(feature_width(model), head_hidden, head_dim), Prototypes(head_dim, prototypes)
        )
        super().__init__(model, head, momentum=momentum, stop_gradient=stop_gradient)
        self.prototypes: list[Any] = [head[1]]  # in a list: the head's already
        self.centre_momentum, self.student_temperature = centre_momentum, student_temperature
        self.teacher_temperature = tuple(teacher_temperature)
        self.register_buffer("centre", torch.zeros(prototypes))
        self._seen: list[Tensor] = []

    @classmethod
    def resolved(cls, model: nn.Module, config: TrainConfig, steps: int) -> dict[str, Any]:
        asked = dict(config.objective_args)
        if asked.pop("preset", None) is None:
            own = {"prototypes": 1024, "momentum": max(0.99, slow(steps))}
            return {**head_sizes(model), **own, **asked}
        return {**PUBLISHED_HEAD, "prototypes": 65536, "momentum": 0.996, **asked}

    def forward(self, crops: Crops, labels: Int[Tensor, b] | None = None) -> dict[str, Tensor]:
        progress = float(self.progress)
        self.prototypes[0].frozen = self.training and progress < 0.01
        student, teacher = self.student_views(crops), self.teacher_views(crops)
        if self.training:
            self._seen.append(teacher.detach().to(self.centre.dtype).mean((0, 1)))
        start, end = self.teacher_temperature
        temperature = start + (end - start) * min(1.0, progress / 0.3)
        loss = dino(
            student,
            teacher,
            self.centre,
            student_temperature=self.student_temperature,
            teacher_temperature=temperature,
        )
        with torch.no_grad():
            usage = ((teacher.float() - self.centre) / temperature).softmax(-1).mean((0, 1))
            used = (-(usage * usage.clamp_min(1e-12).log()).sum()).exp()
        return {"loss": loss, "prototypes used": used}

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        super().after_step(step, total)
        if self._seen:  # over all micro-batches and devices, so that no cut of the batch changes the centre
            mean = averaged(torch.stack(self._seen).mean(0))
            self.centre.lerp_(mean, 1 - self.centre_momentum)
            self._seen.clear()

    def refused_step(self) -> None:
        self._seen.clear()


class Projector(nn.Sequential):
    """Three linear maps with GELU between, from features to where views are compared."""

    def __init__(self, width: int, hidden: int, dim: int) -> None:
        if min(hidden, dim) < 1:
            raise ConfigError(f"head_hidden {hidden} and head_dim {dim} must be at least 1")
        maps = [nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, dim)]
        super().__init__(maps[0], nn.GELU(), maps[1], nn.GELU(), maps[2])
        for layer in maps:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


class Prototypes(nn.Module):
    """Cosines of a feature with ``count`` directions.

    Attributes:
        frozen: the directions stay; they still have a gradient, of 0, as data parallelism expects of each
            parameter.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.frozen = False

    def forward(self, features: Float[Tensor, "*b d"]) -> Float[Tensor, "*b k"]:
        weight = self.weight.detach() + 0 * self.weight if self.frozen else self.weight
        return F.linear(F.normalize(features, dim=-1), F.normalize(weight, dim=-1).to(features.dtype))


class MaskToken(nn.Module):
    """What stands for a hidden patch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(dim))
        nn.init.trunc_normal_(self.token, std=0.02)


def slow(steps: int) -> float:
    """Momentum of a teacher that looks back over a fiftieth of the run, at most 250 steps as published."""
    return 1 - 1 / min(250.0, max(10.0, steps / 50))


def head_sizes(model: nn.Module) -> dict[str, int]:
    """A projector about as wide beside a small model as the published one beside a ViT-S."""
    width = feature_width(model)
    return {"head_dim": min(256, 2 * width), "head_hidden": min(2048, 6 * width)}


def _of_views(pair: Any, images: Float[Tensor, "b v c h w"]) -> Float[Tensor, "v b k"]:
    views = images.transpose(0, 1)
    return pair["projector"](pair["model"](views.flatten(0, 1))).unflatten(0, views.shape[:2])


def _with_tokens(
    pair: Any, images: Float[Tensor, "b v c h w"], mask: Tensor
) -> tuple[Float[Tensor, "v b k"], Float[Tensor, "m k"]]:
    """Views behind the head, and the masked patches of all views behind the same head."""
    views, model = images.transpose(0, 1), pair["model"]
    tokens = model.forward_features(views.flatten(0, 1))
    pooled = pair["projector"](model.forward_head(tokens, pre_logits=True))
    patches = tokens[:, model.num_prefix_tokens :][mask]
    return pooled.unflatten(0, views.shape[:2]), pair["projector"](patches)
