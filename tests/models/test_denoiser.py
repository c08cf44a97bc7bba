"""Learned denoisers: the preconditioning against its Gaussian answer, shapes, the step's view inside."""

import pytest
import torch

from pellucid.analytic.denoisers import GaussianMixture
from pellucid.errors import ConfigError
from pellucid.models.denoiser import CRATEDenoiser, MLPDenoiser, Preconditioned, picture_shape
from pellucid.objectives import VE, VP, Flow, denoising_loss

SHAPE = (2, 4, 6)
NETWORKS = {
    "mlp": lambda: MLPDenoiser(48, 32, 2),
    "crate": lambda: CRATEDenoiser(SHAPE, 2, 16, 2, 4),
    "untied": lambda: CRATEDenoiser(SHAPE, 2, 16, 2, 4, compression="untied"),
}
networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
schedules = pytest.mark.parametrize("schedule", [VE(3.0), VP(3.0), Flow(3.0), VP()], ids=str)


def randomised(network, seed=0):
    """The last layer begins at zero, where gradients of the others are zero as well."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


@schedules
@networks
def test_a_fresh_denoiser_is_that_of_a_gaussian(make, schedule):
    mean, scale, x_t = torch.randn(48), 3.0, 4 * torch.randn(5, 48)
    denoiser = Preconditioned(make(), schedule, mean, scale)
    gaussian = GaussianMixture(mean[None], scale**2 * torch.eye(48)[None], schedule=schedule)
    for t in (0.01, 0.5, schedule.t_max):
        torch.testing.assert_close(denoiser(x_t, t), gaussian(x_t, t), rtol=1e-4, atol=1e-4)


@schedules
def test_the_network_sees_and_answers_unit_variance_at_every_level(schedule):
    """What it has to answer is what the Gaussian guess misses, over the factor in front of it."""
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, x, level):
            seen.update(x=x, level=level)
            return torch.zeros_like(x)

    scale, x = 3.0, 1 + 3.0 * torch.randn(40_000, 2)
    denoiser = Preconditioned(Spy(), schedule, torch.ones(2), scale)
    for t in (0.01, 0.3, 0.9, schedule.t_max):
        level = torch.full((len(x),), t)
        losses = denoising_loss(denoiser, x, level, torch.randn_like(x), schedule, denoiser.weight(level) / 2)
        assert float(losses.mean()) == pytest.approx(1, abs=0.03)
        assert seen["x"].std(0).tolist() == pytest.approx([1, 1], abs=0.03)
        if schedule.alpha(t) > 0:
            expected = schedule.sigma(t) / (schedule.alpha(t) * scale)
            assert seen["level"].exp().tolist()[:3] == pytest.approx([expected] * 3, rel=1e-4)
        assert seen["level"].isfinite().all()


@networks
def test_any_leading_shape_and_a_level_each(make):
    denoiser = Preconditioned(randomised(make()), VP(), torch.zeros(48), 1.0)
    x_t, t = torch.randn(6, 48), torch.linspace(0.1, 0.9, 6)
    together = denoiser(x_t, t)
    for i in range(6):
        torch.testing.assert_close(
            denoiser(x_t[i : i + 1], float(t[i]))[0], together[i], rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(denoiser(x_t.reshape(2, 3, 48), 0.5), denoiser(x_t, 0.5).reshape(2, 3, 48))
    assert (denoiser(x_t, 0.5) - denoiser(x_t, 0.4)).abs().max() > 1e-3


@networks
def test_every_parameter_is_learnt(make):
    network = randomised(make())
    network(torch.randn(4, 48), torch.randn(4)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_patches_go_back_where_they_came_from():
    """A network that answers its own tokens: each output patch depends on its own place through the stem."""
    network = CRATEDenoiser(SHAPE, 2, 16, 0, 4)
    with torch.no_grad():
        network.embed.pos_embed.zero_()
        network.leave.weight.copy_(torch.randn(network.leave.weight.shape))
    x = torch.zeros(1, *SHAPE)
    plain = network(x.flatten(1), torch.zeros(1))
    for row in range(2):
        for column in range(3):
            touched = x.clone()
            touched[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = torch.randn(2, 2, 2)
            changed = (network(touched.flatten(1), torch.zeros(1)) - plain).reshape(SHAPE).abs().sum(0) > 1e-6
            expected = torch.zeros(4, 6, dtype=torch.bool)
            expected[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = True
            assert torch.equal(changed, expected)


def test_pixels_of_a_patch_keep_their_order_and_channel():
    network = CRATEDenoiser(SHAPE, 2, 16, 0, 4)
    with torch.no_grad():
        network.leave.bias.copy_(torch.arange(8.0))
    out = network(torch.zeros(1, 48), torch.zeros(1)).reshape(SHAPE)
    assert torch.equal(out[0], torch.tensor([[0.0, 1], [2, 3]]).repeat(2, 3))
    assert torch.equal(out[1], torch.tensor([[4.0, 5], [6, 7]]).repeat(2, 3))


def test_every_step_of_crate_can_be_watched():
    records = []
    CRATEDenoiser(SHAPE, 2, 16, 2, 4)(torch.randn(3, 48), torch.zeros(3), on_step=records.append)
    assert [(r.layer, r.name) for r in records] == [(k, n) for k in (1, 2) for n in ("compress", "sparsify")]
    for record in records:
        assert record.z.shape == (3, 6, 16)
        assert all(value.isfinite().all() for value in record.step.before_and_after(record.z, record.z_next))


def test_sizes_that_do_not_fit_are_named():
    assert picture_shape(64) == (1, 8, 8)
    with pytest.raises(ConfigError, match="48 numbers are no square gray picture"):
        picture_shape(48)
    with pytest.raises(ConfigError, match="patches of 4 do not tile pictures of 4 x 6"):
        CRATEDenoiser((1, 4, 6), 4)
    with pytest.raises(ConfigError, match="compression is 'exact'"):
        CRATEDenoiser(SHAPE, 2, 16, 2, 4, compression="exact")
