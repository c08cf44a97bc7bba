"""LISTA begins as ISTA, ends ahead of it, and can be looked into layer by layer."""

import pickle  # noqa: TID251 - an estimator must survive it

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks

from pellucid.analytic.lista import LISTA
from pellucid.analytic.sparse_coding import sparse_code
from pellucid.steps import FreeISTA, SoftISTA, StrictISTA, unroll

forms = pytest.mark.parametrize("form", ["tied", "free"])
PRICE = 0.1


def signals(n, seed, d=16, m=32, dtype=torch.float32):
    rng = torch.Generator().manual_seed(1)
    D = torch.nn.functional.normalize(torch.randn(d, m, generator=rng), dim=0)
    rng.manual_seed(seed)
    Z = (torch.rand(n, m, generator=rng) < 0.1) * torch.randn(n, m, generator=rng)
    return (Z @ D.mT).to(dtype), D.to(dtype)


def ista_errors(X, D, codes, steps):
    """Relative squared error of ISTA's code after each of its first steps."""
    step, errors = SoftISTA(*D.shape, sparsity=PRICE), []
    step.dictionary = torch.nn.Parameter(D)
    step.step_size = 0.5 * step.max_step_size()
    with torch.no_grad():
        unroll(
            [step] * steps,
            torch.zeros(1, *codes.shape),
            X[None],
            on_step=lambda r: errors.append(
                float((r.z_next[0] - codes).square().sum() / codes.square().sum())
            ),
        )
    return errors


@parametrize_with_checks([LISTA(epochs=3, random_state=0), LISTA(epochs=3, form="free", random_state=0)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@forms
def test_untrained_it_is_ista(form):
    X, D = signals(50, 0)
    codes = sparse_code(X, D, PRICE).codes
    z = LISTA(D, n_layers=6, form=form, sparsity=PRICE, epochs=0).fit(X).transform(X)
    error = float((z - codes).square().sum() / codes.square().sum())
    assert error == pytest.approx(ista_errors(X, D, codes, 6)[-1], rel=1e-3)


@forms
def test_after_training_layers_do_what_takes_ista_several_times_as_many(form):
    X, D = signals(1500, 0)
    held_out, _ = signals(300, 2)
    codes = sparse_code(held_out, D, PRICE).codes
    network = LISTA(D, n_layers=4, form=form, sparsity=PRICE, epochs=25, random_state=0).fit(X)
    error = float((network.transform(held_out) - codes).square().sum() / codes.square().sum())
    assert ista_errors(held_out, D, codes, 16)[-1] > error  # four times as many
    assert network.loss_[-1] < 0.5 * network.loss_[0]


@forms
def test_every_layer_can_be_seen(form):
    X, D = signals(200, 0)
    network = LISTA(D, n_layers=3, form=form, sparsity=PRICE, epochs=3, random_state=0).fit(X)
    seen = []
    out = network.unrolled(X, on_step=seen.append)
    assert [record.layer for record in seen] == [1, 2, 3]
    assert all(type(record.step) is {"tied": StrictISTA, "free": FreeISTA}[form] for record in seen)
    assert torch.equal(seen[-1].z_next[0], out)
    atoms = network.dictionaries_
    assert atoms.shape == (3, *D.shape)
    assert 0 < (atoms - D).norm() < 0.5 * 3**0.5 * D.norm()  # learnt, and still near where it began
    assert not torch.equal(atoms[0], atoms[2])


def test_every_layer_of_the_tied_form_lowers_its_own_lasso_whatever_was_learnt():
    X, D = signals(400, 0)
    network = LISTA(D, n_layers=4, sparsity=PRICE, epochs=10, random_state=0).fit(X)
    records = []
    network.unrolled(X[:100], on_step=records.append)
    for record in records:
        for i in range(100):
            one = slice(i, i + 1)
            before, after = record.step.before_and_after(
                record.z[:, one], record.z_next[:, one], record.x[:, one]
            )
            assert after <= before * (1 + 1e-5) + 1e-6


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_stay_tensors_of_their_precision(form, dtype):
    X, D = signals(60, 0, dtype=dtype)
    network = LISTA(D.numpy(), n_layers=2, form=form, epochs=1, random_state=0).fit(X)
    z = network.transform(X)
    assert isinstance(z, torch.Tensor)
    assert z.dtype == network.dictionaries_.dtype == dtype
    assert not z.requires_grad


@forms
def test_deterministic_and_pickles(form):
    X, D = signals(100, 0)
    torch.manual_seed(0)
    a = LISTA(D, n_layers=2, form=form, epochs=2, random_state=3).fit(X)
    torch.manual_seed(1)
    b = LISTA(D, n_layers=2, form=form, epochs=2, random_state=3).fit(X)
    assert torch.equal(a.transform(X), b.transform(X))
    assert torch.equal(pickle.loads(pickle.dumps(a)).transform(X), a.transform(X))  # noqa: S301


@pytest.mark.parametrize(
    ("X", "options", "message"),
    [
        (signals(20, 0)[0], {"form": "teid"}, "did you mean 'tied'"),
        (signals(20, 0)[0], {"n_layers": 0}, "n_layers 0"),
        (signals(20, 0)[0], {"sparsity": 1e3}, "every code is zero"),
        (signals(20, 0)[0], {"dictionary": np.ones((3, 3))}, "does not fit signals of width 16"),
        (np.full((5, 3), np.nan), {}, "NaN"),
    ],
)
def test_bad_input_is_named(X, options, message):
    with pytest.raises(ValueError, match=message):
        LISTA(**options).fit(X)
