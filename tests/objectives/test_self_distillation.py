"""SimDINO's loss: the published numbers, and that it depends on three constants alone. DINO's, by hand."""

import pytest
import torch
from torch.nn import functional as F

from pellucid.objectives.self_distillation import (
    alignment,
    dino,
    expansion,
    masked_alignment,
    published_constants,
    simdino,
)


def unit(*shape, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


@pytest.mark.parametrize("eps_squared", [0.5, 0.05])
@pytest.mark.parametrize("expand_teacher", [False, True])
def test_equals_the_published_loss_and_its_gradient(recorded, eps_squared, expand_teacher):
    record = recorded("simdino_loss")
    batch, dim = record["meta"]["batch"], record["meta"]["dim"]
    student = record["student"].requires_grad_()
    constants = published_constants(dim, devices=1, local_batch=batch, eps_squared=eps_squared)
    parts = simdino(
        student.unflatten(0, (-1, batch)),
        record["teacher"].unflatten(0, (-1, batch)),
        expand_teacher=expand_teacher,
        **constants,
    )
    key = f"values/eps{eps_squared}_expa{int(expand_teacher)}"
    for ours, theirs in (("loss", "loss"), ("alignment", "compression"), ("expansion", "expansion")):
        torch.testing.assert_close(parts[ours], record[f"{key}/{theirs}"], rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(parts["loss"], student)
    expected = record[f"{key}/grad_student"]
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_alignment_is_the_mean_over_pairs_of_different_views():
    student, teacher = unit(5, 4, 8), unit(2, 4, 8, seed=1)
    pairs = [(i, j) for i in range(2) for j in range(5) if i != j]
    expected = torch.stack([(teacher[i] * student[j]).sum(-1).mean() for i, j in pairs]).mean()
    torch.testing.assert_close(alignment(student, teacher), expected)
    same = unit(1, 4, 8).expand(3, 4, 8)
    assert alignment(same, same[:2]).item() == pytest.approx(1)


def test_expansion_is_the_rate_of_each_group():
    features = unit(2, 12, 6)

    def rate(z, eps):
        n, d = z.shape
        return 0.5 * torch.logdet(torch.eye(d, dtype=z.dtype) + d / (n * eps**2) * z.mT @ z)

    groups = [features[v, i : i + 4] for v in range(2) for i in (0, 4, 8)]
    expected = torch.stack([rate(z, 0.3) for z in groups]).mean()
    torch.testing.assert_close(expansion(features, 0.3, 4).double(), expected, rtol=1e-5, atol=0)
    whole = torch.stack([rate(z, 0.3) for z in features]).mean()
    torch.testing.assert_close(expansion(features, 0.3).double(), whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_the_loss_does_not_change_with_the_split_of_a_batch(devices):
    """Groups are of the batch: parts that hold whole groups average to the whole."""
    student, teacher = unit(4, 16, 8), unit(2, 16, 8, seed=1)
    constants = {"eps": 0.4, "gamma": 0.01, "group_size": 4}
    whole = simdino(student, teacher, **constants)
    parts = [
        simdino(s, t, **constants)
        for s, t in zip(student.chunk(devices, 1), teacher.chunk(devices, 1), strict=True)
    ]
    for key, value in whole.items():
        torch.testing.assert_close(torch.stack([part[key] for part in parts]).mean(), value)


def test_the_published_run_on_one_device():
    """Eight devices of 64 with eps 0.05: the ceiling of its expansion is 0.4496."""
    constants = published_constants()
    assert constants["eps"] ** 2 == pytest.approx(0.4)
    assert constants["gamma"] == pytest.approx(0.00586, abs=5e-6)
    assert constants["group_size"] == 64
    # The largest rate: 64 unit features that are orthogonal to each other.
    spread = torch.eye(256, dtype=torch.float64)[:64].repeat(8, 1).unsqueeze(0)
    assert constants["gamma"] * expansion(spread, constants["eps"], 64) == pytest.approx(0.4496, abs=5e-5)
    assert constants["gamma"] * expansion(unit(1, 512, 256), constants["eps"], 64) < 0.4496


def test_collapse_is_worse_than_spread_although_it_agrees():
    constants = {"eps": 0.3, "gamma": 0.05}
    collapsed = unit(1, 1, 16).expand(3, 32, 16)
    spread = unit(1, 32, 16).expand(3, 32, 16)
    assert simdino(collapsed, collapsed[:2], **constants)["alignment"].item() == pytest.approx(1)
    assert (
        simdino(spread, spread[:2], **constants)["loss"]
        < simdino(collapsed, collapsed[:2], **constants)["loss"]
    )


def test_half_precision_does_not_touch_the_rate():
    student = unit(3, 32, 16, dtype=torch.float32)
    expected = expansion(student[:2], 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(expansion(student[:2], 0.05), expected)
    rounded = expansion(student[:2].bfloat16(), 0.05)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, expected, rtol=1e-3, atol=0)


def test_the_published_run_is_its_groups_on_one_device():
    """Eight devices with 64 images each: the mean of their losses, as the program computes them."""
    student, teacher = unit(10, 512, 256), unit(2, 512, 256, seed=1)
    found = simdino(student, teacher, **published_constants(256))
    expansions = []
    for s, t in zip(student[:2].split(64, 1), teacher.split(64, 1), strict=True):
        for view in (s + t) / 2:
            # Local moments over the number of all images, the flag's eps, as the program has it.
            moments = torch.eye(256, dtype=view.dtype) + 256 / (64 * 8 * 0.05) * view.mT @ view
            expansions.append(0.5 * torch.logdet(moments) * (256 + 512) / (256 * 512))
    expected = torch.stack(expansions).mean()
    torch.testing.assert_close(found["expansion"].double(), expected, rtol=1e-5, atol=0)


def masks(b=6, patches=9, share=0.4):
    mask = torch.rand(b, patches, generator=torch.Generator().manual_seed(3)) < share
    mask[1] = False
    mask[2] = True
    return mask


def test_masked_alignment_is_the_mean_of_the_images_means():
    mask = masks()
    student, teacher = (3 * unit(int(mask.sum()), 8, seed=seed) for seed in (0, 1))
    expected, place = torch.zeros((), dtype=torch.float64), 0
    for image in mask:
        count = int(image.sum())
        cosines = [F.cosine_similarity(student[place + k], teacher[place + k], dim=0) for k in range(count)]
        expected += sum(cosines) / max(1, count) / len(mask)
        place += count
    assert place == len(student)
    torch.testing.assert_close(masked_alignment(student, teacher, mask), expected)
    whole = torch.ones(6, 9, dtype=torch.bool)
    same = unit(54, 8)
    assert masked_alignment(same, same, whole).item() == pytest.approx(1)
    none = torch.zeros(6, 9, dtype=torch.bool)
    assert masked_alignment(same[:0], same[:0], none) == 0


def test_masked_alignment_does_not_change_with_the_split_of_a_batch():
    mask = masks()
    student, teacher = (unit(int(mask.sum()), 8, seed=seed) for seed in (0, 1))
    sizes = [int(part.sum()) for part in mask.chunk(3)]
    parts = [
        masked_alignment(*args)
        for args in zip(student.split(sizes), teacher.split(sizes), mask.chunk(3), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), masked_alignment(student, teacher, mask))


@pytest.mark.parametrize(("views", "seen"), [(2, 2), (5, 2), (4, 1), (3, 3)])
def test_dino_is_the_cross_entropy_of_each_pair_of_different_views(views, seen):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(views, 4, 7, generator=generator).requires_grad_()
    teacher, centre = torch.randn(seen, 4, 7, generator=generator), torch.randn(7, generator=generator)
    expected, pairs = 0.0, 0
    for i in range(seen):
        for j in range(views):
            if i == j:
                continue
            pairs += 1
            for image in range(4):
                p = ((teacher[i, image] - centre) / 0.3).exp()
                q = (student[j, image] / 0.2).exp()
                expected = expected - ((p / p.sum()) * (q / q.sum()).log()).sum() / 4
    loss = dino(student, teacher, centre, student_temperature=0.2, teacher_temperature=0.3)
    torch.testing.assert_close(loss, expected / pairs)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected / pairs, student)[0])


def test_what_keeps_dino_from_collapse():
    """A prototype that takes everything is worth nothing once the centre knows; all alike is the worst."""
    k = 16
    one = torch.zeros(3, 4, k)
    one[..., 0] = 1.0
    confident = dino(one, one[:2], torch.zeros(k))
    centred = dino(one, one[:2], one[0, 0])
    flat = dino(torch.zeros(3, 4, k), torch.zeros(2, 4, k), torch.zeros(k))
    assert confident < 0.01
    assert flat.item() == pytest.approx(torch.tensor(float(k)).log().item())
    assert centred > flat


def test_half_precision_scores_are_compared_in_single():
    student, teacher = unit(3, 4, 16, dtype=torch.float32), unit(2, 4, 16, seed=1, dtype=torch.float32)
    rounded = dino(student.bfloat16(), teacher.bfloat16(), torch.zeros(16))
    assert rounded.dtype == torch.float32
    again = dino(student.bfloat16().float(), teacher.bfloat16().float(), torch.zeros(16))
    assert torch.equal(rounded, again)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alignment(unit(1, 4, 8), unit(1, 4, 8)), "one view has no other"),
        (lambda: alignment(unit(3, 4, 8), unit(2, 5, 8)), "do not fit"),
        (lambda: alignment(unit(2, 4, 8), unit(3, 4, 8)), "do not fit"),
        (lambda: expansion(unit(2, 10, 8), 0.3, 4), "a batch of 10 does not fall into groups of 4"),
        (lambda: expansion(unit(2, 10, 8), 0.3, 0), "groups of 0"),
        (lambda: dino(unit(1, 4, 8), unit(1, 4, 8), torch.zeros(8)), "one view has no other"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
