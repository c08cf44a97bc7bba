"""SimDINO, SimDINOv2 and DINO: the loss by hand, who moves and who does not, whole runs."""

import math

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from pellucid.data import Crops
from pellucid.errors import ConfigError, NumericsError
from pellucid.models import create_model
from pellucid.training import TrainConfig
from pellucid.training.checkpoint import load_checkpoint
from pellucid.training.config import read_config
from pellucid.training.learner import Learner
from pellucid.training.recipe import MuonAdamW, cosine
from pellucid.training.representation import hidden
from pellucid.training.self_distillation import DINO, SimDINO, SimDINOv2, slow

BACKBONES = ["crate_digits", "tost_digits", "vit_digits"]
HEAD = {"head_dim": 16, "head_hidden": 24}


def backbone(name="crate_digits", **options):
    torch.manual_seed(0)
    return create_model(name, **{"depth": 1, "num_classes": 0, "dynamic_img_size": True, **options})


def simdino(model=None, kind=SimDINO, **options):
    numbers = {"eps": 0.5, "gamma": 0.1, "group_size": 8, "momentum": 0.9, **HEAD}
    return kind(model or backbone(), **(numbers | options))


def dino(model=None, **options):
    return DINO(model or backbone(), **({"prototypes": 12, "momentum": 0.9, **HEAD} | options))


MAKE = {
    "simdino": simdino,
    "simdinov2": lambda **options: simdino(**({"patches": 0.7} | options)),
    "dino": dino,
}


def views(batch=16, large=2, small=1, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    images = [
        torch.randn(batch, n, 1, side, side, generator=generator, dtype=dtype)
        for n, side in ((large, 8), (small, 4))
    ]
    mask = torch.rand(batch, large, 16, generator=generator) < 0.4
    mask[: batch // 4] = False  # some hide nothing
    return Crops(*images, mask)


def learner_of(objective, steps=10, **options):
    optimizer = MuonAdamW(objective.model, 1e-2, 1e-2, 0.05, objective.heads)
    return Learner(objective, optimizer, steps, **options)


def step(learner, crops):
    learner.losses((crops, None), micro=0)["loss"].backward()
    learner.update()


def apart(objective, steps=2):
    """The objective when its teacher is no longer its student."""
    learner = learner_of(objective)
    for seed in range(1, steps + 1):
        step(learner, views(seed=seed))
    return objective


def behind(pair, images):
    """One view of each image, behind the head of student or teacher."""
    tokens = pair["model"].forward_features(images)
    return pair["projector"](pair["model"].forward_head(tokens, pre_logits=True))


def all_views(objective, crops):
    """Each view on its own: the student's list, the teacher's list."""
    large, small = crops.large.unbind(1), crops.small.unbind(1)
    student = [behind(objective.student, view) for view in (*large, *small)]
    with torch.no_grad():
        return student, [behind(objective.teacher, view) for view in large]


def spread(z, eps):
    n, d = z.shape
    return 0.5 * torch.logdet(torch.eye(d) + d / (n * eps**2) * z.mT @ z)


def by_hand(student, teacher, objective):
    """SimDINO's loss, pair by pair and group by group."""
    student, teacher = ([F.normalize(z, dim=-1) for z in part] for part in (student, teacher))
    pairs = [(i, j) for i in range(len(teacher)) for j in range(len(student)) if i != j]
    alignment = sum((teacher[i] * student[j]).sum(-1).mean() for i, j in pairs) / len(pairs)
    size = objective.group_size
    groups = [
        ((s + t) / 2 if objective.expand_teacher else s)[first : first + size]
        for s, t in zip(student, teacher, strict=False)
        for first in range(0, len(s), size)
    ]
    rate = sum(spread(z, objective.eps) for z in groups) / len(groups)
    return alignment, rate


# --- the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(
    "options", [{}, {"expand_teacher": False, "group_size": 16}], ids=["mean", "student"]
)
def test_simdinos_loss_by_hand(name, options):
    objective, crops = apart(simdino(backbone(name), **options)), views()
    student, teacher = all_views(objective, crops)
    assert (teacher[0] - student[0]).abs().max() > 1e-3
    alignment, rate = by_hand(student, teacher, objective)
    parts = objective(crops)
    torch.testing.assert_close(parts["alignment"], alignment.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts["rate"], rate.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts["loss"], -alignment - objective.gamma * rate, rtol=1e-4, atol=1e-5)
    same = [F.cosine_similarity(s, t).mean() for s, t in zip(student, teacher, strict=False)]
    torch.testing.assert_close(parts["agreement"], (sum(same) / 2).detach(), rtol=1e-4, atol=1e-5)
    assert 0 < parts["rate share"] < 1


@pytest.mark.parametrize("name", BACKBONES)
def test_dinos_loss_by_hand(name):
    objective, crops = apart(dino(backbone(name))), views()
    assert objective.centre.any()
    student, teacher = all_views(objective, crops)
    temperature = 0.04 + 0.03 * 0.2 / 0.3  # two steps of ten, and the rise ends after three
    loss = 0.0
    pairs = [(i, j) for i in range(2) for j in range(3) if i != j]
    for i, j in pairs:
        target = ((teacher[i] - objective.centre) / temperature).softmax(-1)
        loss -= (target * (student[j] / 0.1).log_softmax(-1)).sum(-1).mean() / len(pairs)
    torch.testing.assert_close(objective(crops)["loss"], loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), [
    ("crate_digits", {"reg_tokens": 2}),
    ("crate_digits", {"stem": "linear", "class_token": False, "global_pool": "avg"}),
    ("tost_digits", {}),
    ("vit_digits", {"reg_tokens": 2}),
])  # fmt: skip
def test_simdinov2s_loss_by_hand(name, options):
    objective = apart(simdino(backbone(name, **options), SimDINOv2, patches=0.7))
    crops = views()
    mask, token = crops.mask, objective.heads["mask"].token
    student, teacher = all_views(objective, crops)
    per_image = []
    for v in range(2):
        with hidden(objective.model, mask[:, v], token):
            tokens = objective.model.forward_features(crops.large[:, v])
        pooled = objective.model.forward_head(tokens, pre_logits=True)
        student[v] = objective.heads["projector"](pooled)
        with torch.no_grad():
            shown = objective.teacher["model"].forward_features(crops.large[:, v])
        for i in range(len(mask)):
            cosines = []
            for place in mask[i, v].nonzero().flatten().tolist():
                ours = objective.heads["projector"](tokens[i, tokens.shape[1] - 16 + place])
                theirs = objective.teacher["projector"](shown[i, tokens.shape[1] - 16 + place])
                cosines.append(F.cosine_similarity(ours, theirs, dim=0))
            per_image.append(sum(cosines) / len(cosines) if cosines else torch.zeros(()))
    patches = torch.stack(per_image).mean()
    alignment, rate = by_hand(student, teacher, objective)
    parts = objective(crops)
    torch.testing.assert_close(parts["patches"], patches.detach(), rtol=1e-4, atol=1e-5)
    expected = -alignment - objective.gamma * rate - 0.7 * patches
    torch.testing.assert_close(parts["loss"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAKE)
def test_no_cut_of_a_batch_into_whole_groups_changes_loss_gradient_or_centre(name):
    def gradients(parts):
        objective = MAKE[name]().double()
        crops = views(dtype=torch.float64)
        size = 16 // parts
        losses = []
        for first in range(0, 16, size):
            loss = objective(Crops(*(part[first : first + size] for part in crops)))["loss"]
            (loss / parts).backward()
            losses.append(loss.item())
        objective.after_step(0, 10)
        found = {key: p.grad for key, p in objective.named_parameters() if p.grad is not None}
        return sum(losses) / parts, found, dict(objective.named_buffers())

    loss, whole, buffers = gradients(1)
    cut_loss, cut, cut_buffers = gradients(2)
    assert cut_loss == pytest.approx(loss, rel=1e-5)
    assert cut.keys() == whole.keys()
    for key, gradient in whole.items():
        # The rate is made in float32.
        torch.testing.assert_close(cut[key], gradient, rtol=1e-4, atol=1e-7, msg=key)
    for key, value in buffers.items():
        torch.testing.assert_close(cut_buffers[key], value, msg=key)


def test_half_precision_reaches_the_backbone_and_not_the_rate():
    objective, crops = apart(simdino()), views()
    exact = objective(crops)
    with torch.autocast("cpu", torch.bfloat16):
        parts = objective(crops)
        rough = F.normalize(objective.student_views(crops).float(), dim=-1)
        shown = F.normalize(objective.teacher_views(crops).float(), dim=-1)
    assert parts["loss"].dtype == torch.float32
    assert parts["rate"] != exact["rate"]
    expected = torch.stack(
        [spread(z, 0.5) for z in ((rough[:2] + shown) / 2).unflatten(1, (2, 8)).flatten(0, 1)]
    )
    torch.testing.assert_close(parts["rate"], expected.mean().detach(), rtol=1e-5, atol=0)


# --- who moves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("model", BACKBONES)
def test_all_of_the_student_learns_and_nothing_of_the_teacher(name, model):
    objective = MAKE[name](model=backbone(model))
    if name == "dino":  # the prototypes' first hundredth is over
        objective.progress.fill_(0.5)
    objective(views())["loss"].backward()
    for key, parameter in objective.named_parameters():
        if key.startswith("teacher."):
            assert parameter.grad is None, key
            assert not parameter.requires_grad
        else:
            assert parameter.grad.any(), key


@pytest.mark.parametrize("name", MAKE)
def test_the_teacher_is_the_moving_average_of_the_student(name):
    objective = MAKE[name](model=backbone("tost_digits", stem="conv_bn"))
    learner = learner_of(objective, steps=5)
    expected = {key: value.clone() for key, value in objective.teacher.state_dict().items()}
    for number in range(5):
        step(learner, views(seed=number))
        momentum = 1 - 0.1 * 0.5 * (1 + math.cos(math.pi * number / 5))
        for key, value in expected.items():
            part, rest = key.split(".", 1)
            now = objective.student[part].state_dict()[rest]
            if value.is_floating_point():
                value.lerp_(now, 1 - momentum)
            else:
                value.copy_(now)  # how many batches a BatchNorm has seen
    counted = [key for key, value in expected.items() if not value.is_floating_point()]
    assert counted
    found = objective.teacher.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert any(not torch.equal(found[f"model.{k}"], v) for k, v in objective.model.state_dict().items())
    before = {key: value.clone() for key, value in found.items()}
    objective.after_step(5, 5)  # at the end of the schedule its momentum is 1
    assert all(torch.equal(found[key], value) for key, value in before.items() if key not in counted)
    assert float(objective.progress) == pytest.approx(6 / 5)


def test_training_does_not_reach_the_teacher():
    objective = simdino(backbone(drop_rate=0.5))
    crops = views()
    for module in objective.train().teacher.modules():
        assert not module.training
    assert torch.equal(objective.teacher_views(crops), objective.teacher_views(crops))
    assert not torch.equal(objective.student_views(crops), objective.student_views(crops))


@pytest.mark.parametrize("name", ["simdino", "dino"])
def test_without_stop_gradient_both_learn_as_one(name):
    crops = views()
    objective = apart(MAKE[name](stop_gradient=False))
    objective.zero_grad()
    loss = objective(crops)["loss"]
    loss.backward()
    student = [behind(objective.student, view) for view in (*crops.large.unbind(1), *crops.small.unbind(1))]
    if name == "simdino":
        alignment, rate = by_hand(student, student[:2], objective)
        expected = -alignment - objective.gamma * rate
    else:
        expected = 0.0
        for i, j in ((i, j) for i in range(2) for j in range(3) if i != j):
            target = ((student[i] - objective.centre) / (0.04 + 0.03 * 0.2 / 0.3)).softmax(-1)
            expected -= (target * (student[j] / 0.1).log_softmax(-1)).sum(-1).mean() / 4
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(expected, list(objective.model.parameters()))
    for parameter, gradient in zip(objective.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=2e-3, atol=1e-5)


def test_the_centre_is_the_running_mean_of_the_teachers_scores():
    objective = dino(centre_momentum=0.8)
    learner = learner_of(objective)
    expected = torch.zeros(12)
    for seed in range(3):
        crops = views(seed=seed)
        with torch.no_grad():
            mean = torch.stack(all_views(objective, crops)[1]).mean((0, 1))
        expected = 0.8 * expected + 0.2 * mean
        step(learner, crops)
        torch.testing.assert_close(objective.centre, expected)
    objective.eval()
    objective(views(seed=9))
    objective.train()
    objective.after_step(3, 10)
    torch.testing.assert_close(objective.centre, expected)  # evaluation leaves no trace


def test_prototypes_stay_for_the_first_hundredth_of_a_run():
    objective = dino()
    learner = learner_of(objective, steps=300)
    weight = objective.heads["projector"][1].weight

    def directions():
        return F.normalize(weight.detach(), dim=-1).clone()

    start = directions()
    for seed in range(4):
        step(learner, views(seed=seed))
        if seed < 3:
            torch.testing.assert_close(directions(), start)
    step(learner, views(seed=4))
    assert (directions() - start).abs().max() > 1e-3


# --- hidden patches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [
    ("crate_digits", {"stem": "conv", "reg_tokens": 2}),
    ("crate_digits", {"stem": "linear"}),
    ("tost_digits", {}),
    ("vit_digits", {"reg_tokens": 2}),
    ("vit_digits", {"dynamic_img_size": False}),
])  # fmt: skip
def test_pixels_under_the_mask_are_not_seen(name, options):
    model = backbone(name, **options)
    token = torch.randn(64)
    crops = views()
    images, mask = crops.large[:, 0], crops.mask[:, 0]
    under = mask.unflatten(-1, (4, 4)).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    with torch.no_grad():
        with hidden(model, mask, token):
            seen = model.forward_features(images)
            assert torch.equal(model.forward_features(images.masked_fill(under, 7.0)), seen)
            others = model.forward_features(images.masked_fill(~under, 7.0))
            assert (others - seen).abs().flatten(1).amax(1).min() > 1e-3
        whole = model.forward_features(images)
        shown = ~mask.any(-1)
        torch.testing.assert_close(seen[shown], whole[shown])
        assert (seen - whole)[~shown].abs().flatten(1).amax(1).min() > 1e-3
        with hidden(model, torch.ones_like(mask), token):
            nothing = model.forward_features(images)
        torch.testing.assert_close(nothing, nothing[:1].expand_as(nothing))


def test_the_student_is_kept_from_what_is_hidden_and_the_teacher_is_not():
    objective = apart(MAKE["simdinov2"]())
    crops = views(small=0)
    under = crops.mask.unflatten(-1, (4, 4)).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, None]
    other = crops._replace(large=crops.large.masked_fill(under, 3.0))
    with torch.no_grad():
        (student, teacher, _), (same, changed, _) = (objective._with_patches(c) for c in (crops, other))
    assert torch.equal(student, same)
    assert not torch.equal(teacher, changed)


# --- numbers of a run -------------------------------------------------------------------------------------


def built(kind=SimDINO, steps=100, model=None, args=None, **options):
    config = TrainConfig(data="digits", objective_args=args or {}, **{"batch_size": 64, **options})
    return kind.build(model or backbone(), config, steps)


@pytest.mark.parametrize("kind", [SimDINO, SimDINOv2])
def test_the_published_preset(kind):
    objective = built(kind, args={"preset": "published"})
    assert objective.eps == 0.4**0.5
    assert objective.gamma == 1 / 256 + 1 / 512
    assert objective.gamma == pytest.approx(0.00586, abs=5e-6)
    assert objective.group_size == 64
    assert objective.momentum == 0.996
    widths = [m.weight.shape for m in objective.heads["projector"] if isinstance(m, nn.Linear)]
    assert widths == [(2048, 64), (2048, 2048), (256, 2048)]
    assert "preset" not in objective.settings
    assert built(kind, batch_size=512, args={"preset": "published", "eps": 0.3}).eps == 0.3


def test_the_numbers_of_a_run_follow_its_model_and_length():
    found = built(steps=1000).settings
    assert found["group_size"] == 64
    assert found["gamma"] == pytest.approx(1 / found["head_dim"] + 1 / 64)
    assert found["momentum"] == slow(1000) == 0.95
    assert built(batch_size=96, accumulate=2).settings["group_size"] == 48
    assert [slow(n) for n in (10, 10**6)] == [0.9, 0.996]
    assert built(SimDINOv2).patches == 1.0
    assert built(SimDINOv2, args={"patches": 0.5}).patches == 0.5
    assert built().masking is None
    assert built(SimDINOv2).masking.grid == (4, 4)
    published = built(DINO, args={"preset": "published", "prototypes": 100})
    assert published.settings == {"head_dim": 256, "head_hidden": 2048, "prototypes": 100, "momentum": 0.996}
    assert built(args={"gamma": "1e-3"}).gamma == 1e-3  # as YAML reads it


SELF = {"objective": "simdino", "model_args": {"depth": 1}, "batch_size": 64}


@pytest.mark.parametrize(("options", "message"), [
    ({"objective_args": {"group_size": 48}}, "group_size 48 does not divide the 64 images seen at once"),
    ({"objective_args": {"group_size": 64}, "accumulate": 2}, "does not divide the 32 images"),
    ({"objective_args": {"group_size": 0}}, "group_size is 0; at least one"),
    ({"objective_args": {"group_size": "many"}}, "group_size is 'many'; expected int"),
    ({"objective_args": {"gama": 0.1}}, "unknown objective_args option 'gama' - did you mean 'gamma'"),
    ({"objective_args": {"prest": "published"}}, "did you mean 'preset'"),
    ({"objective_args": {"preset": "publish"}}, "did you mean 'published'"),
    ({"objective_args": {"gamma": -0.1}}, "gamma -0.1 .* must not be negative"),
    ({"objective_args": {"gamma": math.inf}}, "gamma is inf; it must be finite"),
    ({"objective_args": {"patches": -1.0}}, "must not be negative"),
    ({"objective_args": {"eps": 0}}, "eps is 0; the distortion must be larger"),
    ({"objective_args": {"eps": "small"}}, "eps is 'small'; expected float"),
    ({"objective_args": {"head_dim": 0}}, "head_dim 0 must be at least 1"),
    ({"objective_args": {"momentum": 1.0}}, "momentum is 1.0; it must lie in 0..1"),
    ({"objective": "dino", "objective_args": {"gamma": 0.1}}, "unknown objective_args option 'gamma'"),
    ({"objective": "dino", "objective_args": {"prototypes": 1}}, "there must be two"),
    ({"objective": "dino", "objective_args": {"teacher_temperature": 0.1}}, "expected tuple or list"),
    ({"objective": "dino", "objective_args": {"teacher_temperature": [0.1]}}, "expected one and two numbers"),
    ({"objective": "dino", "objective_args": {"centre_momentum": 2.0}}, "centre_momentum is 2.0"),
    ({"large_crops": 1}, "one view of an image has no other to agree with - take two --large-crops"),
    ({"small_crops": 1, "small_size": 3}, "small_size is 3; it must be made of patches of 2"),
    ({"weight_decay_end": -0.1}, "weight_decay_end is -0.1; it must not be negative"),
    ({"model": "vit_digits", "model_args": {"global_pool": ""}}, "an image needs one feature"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(digits, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        digits.train(tmp_path / "run", **{**SELF, **options})
    assert not (tmp_path / "run").exists()


def test_a_model_without_features_or_patches_is_refused():
    with pytest.raises(ConfigError, match="timm's forward_features, and Linear has none"):
        simdino(nn.Linear(3, 2))
    resnet = create_model("resnet18", num_classes=0)
    with pytest.raises(ConfigError, match="ResNet has no stem whose patches could be hidden"):
        hidden(resnet, torch.ones(1, 4, dtype=torch.bool), torch.zeros(3))


def test_weight_decay_follows_its_schedule_and_heads_are_adamws():
    objective = simdino()
    learner = learner_of(objective, steps=4, weight_decay=(0.04, 0.4))
    optimizer = learner.optimizer
    for number in range(4):
        step(learner, views(seed=number))
        found = {group["weight_decay"] for group in optimizer.param_groups if group["decays"]}
        assert found == {cosine(0.04, 0.4, number, 4)}
        assert {g["weight_decay"] for g in optimizer.param_groups if not g["decays"]} == {0.0}
    assert [cosine(0.04, 0.4, number, 4) for number in (0, 2, 4)] == pytest.approx([0.04, 0.22, 0.4])
    muon, adamw = optimizer.parts
    names = [{n for group in part.param_groups for n in group["param_names"]} for part in (muon, adamw)]
    heads = {f"heads.{name}" for name, _ in objective.heads.named_parameters()}
    assert len(heads) == 6
    assert heads < names[1]
    assert not any(name.startswith(("heads", "teacher")) for name in names[0])
    assert not any(name.startswith("teacher") for name in names[1])


@pytest.mark.parametrize("name", MAKE)
def test_a_step_that_is_refused_leaves_no_trace(name):
    """Neither now, nor in the next centre."""
    one, other = (learner_of(apart(MAKE[name]())) for _ in range(2))
    before = {key: value.clone() for key, value in one.tensors().items()}
    bad = views(seed=5)
    bad.large[3, 1, 0, 2, 2] = math.nan
    one.losses((views(seed=4), None), micro=0)["loss"].backward()
    one.losses((bad, None), micro=1)["loss"].backward()
    with pytest.raises(NumericsError):
        one.update()
    after = one.tensors()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    for learner in (one, other):
        step(learner, views(seed=6))
    theirs = other.tensors()
    assert all(torch.equal(value, theirs[key]) for key, value in one.tensors().items())


# --- whole runs -------------------------------------------------------------------------------------------

RUNS = {
    "simdino": {"objective": "simdino", "small_crops": 1},
    "simdinov2": {"objective": "simdinov2", "model_args": {"depth": 1, "reg_tokens": 2}},
    "dino": {"objective": "dino", "objective_args": {"prototypes": 64}},
}


def options_of(name):
    return {**SELF, "batch_size": 128, "epochs": 1, "eval_every": 10, "engine": "plain", **RUNS[name]}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_hands_over_its_teacher(digits, name):
    run = digits.reference(**options_of(name))
    saved = load_checkpoint(run / "checkpoints").tensors
    model = load_model(run)
    assert model
    for key, value in model.items():
        assert torch.equal(value, saved[f"objective/teacher.model.{key}"]), key
    moved = [key for key, value in model.items() if not torch.equal(value, saved[f"objective/model.{key}"])]
    assert len(moved) > 5
    assert not any("projector" in key or key.startswith(("head", "mask")) for key in model)


def load_model(run):
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_resumed_it_ends_in_the_same_bits(digits, tmp_path, differences, name):
    options = options_of(name)
    digits.stopped(tmp_path / "run", 4, **options)
    tensors = load_checkpoint(tmp_path / "run" / "checkpoints").tensors
    assert any(key.startswith("objective/teacher.") for key in tensors)
    assert name != "dino" or tensors["objective/centre"].any()
    digits.train(tmp_path / "run", resume=True, **options)
    assert differences(tmp_path / "run", digits.reference(**options)) == []


def test_engines_agree_to_the_bit(digits, differences):
    options = options_of("simdino")
    plain, lightning = (digits.reference(**{**options, "engine": e}) for e in ("plain", "lightning"))
    assert differences(plain, lightning) == []


@pytest.mark.parametrize("name", RUNS)
def test_the_configuration_is_resolved_and_accepted_back(digits, tmp_path, name):
    run = digits.reference(**options_of(name))
    written = read_config(run / "config.yaml")
    args = written["objective_args"]
    assert args["momentum"] == slow(11) if name != "dino" else args["momentum"] == 0.99
    if name != "dino":
        assert args["group_size"] == 64
        assert args["gamma"] == pytest.approx(1 / args["head_dim"] + 1 / 64)
    assert written["small_crops"] == RUNS[name].get("small_crops", 0)
    assert (written["small_size"], written["crop_split"]) == (4, 0.8)
    again = {**written, "out": str(tmp_path / "again"), "epochs": 0.1}
    del again["data"]
    out = digits.train(tmp_path / "again", **{k: v for k, v in again.items() if k != "out"})
    expected = {**written, "out": str(out), "epochs": 0.1}
    assert yaml.safe_load((out / "config.yaml").read_text()) == expected


def test_the_published_preset_is_written_as_numbers(digits, tmp_path):
    options = {**SELF, "epochs": 0.05, "objective_args": {"preset": "published", "head_hidden": 32}}
    out = digits.train(tmp_path / "run", **options)
    assert read_config(out / "config.yaml")["objective_args"] == {
        "head_dim": 256,
        "head_hidden": 32,
        "eps": 0.4**0.5,
        "gamma": 1 / 256 + 1 / 512,
        "group_size": 64,
        "momentum": 0.996,
    }
