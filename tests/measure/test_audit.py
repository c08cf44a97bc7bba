"""The audit against what can be recomputed by hand, and against planted answers."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pellucid
from pellucid.errors import ConfigError, DataError
from pellucid.measure.audit import ROW_KEYS, audit, coherence, singular_values
from pellucid.models import CRATE, create_model
from pellucid.objectives import coding_rate
from pellucid.steps import ISTA, MSSA


def small(**options):
    torch.manual_seed(0)
    return CRATE(8, 2, 1, 10, embed_dim=32, depth=2, num_heads=4, **options)


def images(count=12):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("compression", ["tied", "untied", "exact"])
def test_rows_are_what_the_records_give_by_hand(compression):
    model = small(compression=compression).eval()
    result = audit(model, [images()])
    records = []
    with torch.no_grad():
        model.forward_features(images(), records.append)
    assert [(row["layer"], row["step"]) for row in result.rows] == [
        (1, "compress"),
        (1, "sparsify"),
        (2, "compress"),
        (2, "sparsify"),
    ]
    for row, record in zip(result.rows, records, strict=True):
        assert tuple(row) == ROW_KEYS
        step, z, after = record.step.double(), record.z.double(), record.z_next.double()
        before_value, after_value = step.objective(z, z), step.objective(after, z)
        assert row["before"] == pytest.approx(before_value.mean().item(), rel=1e-4)
        assert row["after"] == pytest.approx(after_value.mean().item(), rel=1e-4)
        assert row["descended"] == (after_value < before_value).double().mean().item()
        assert row["nonzero"] == pytest.approx((after != 0).double().mean().item())
        rates = coding_rate(F.normalize(after, dim=-1), 0.1)
        assert row["coding_rate"] == pytest.approx(rates.mean().item(), rel=1e-4)
        step.float()


def test_a_step_of_no_length_has_not_descended():
    model = small(compress_step_size=0.0)
    rows = [row for row in audit(model, [images()]).rows if row["step"] == "compress"]
    assert [row["descended"] for row in rows] == [0.0, 0.0]


def test_a_dictionary_grown_past_the_bound_is_named():
    model = small()
    with torch.no_grad():
        model.layers[1]["sparsify"].dictionary.mul_(8)
    result = audit(model, [images()])
    row = result.rows[3]
    assert row["max_step_size"] == pytest.approx(2 / 64, rel=1e-3)
    assert row["after"] > row["before"]
    assert row["descended"] == 0
    assert result.verdict["descends"] is False
    told = "\n".join(result.verdict["details"])
    assert "layer 2 sparsify raises LASSO" in told
    assert "layer 2 sparsify: step size 0.1 is beyond the bound 0.0312" in told


def test_a_model_whose_every_step_falls_is_said_to_descend():
    model = small(sparsity=0.5)
    with torch.no_grad():  # one bundle of tokens: attention can only draw them together
        model.embed.pos_embed.mul_(0.1)
    result = audit(model, [images()])
    falling = all(row["descended"] >= 0.99 for row in result.rows)
    assert result.verdict["descends"] is falling
    assert falling
    assert result.verdict["text"].startswith("All 4 steps lower their objective")


def test_tokens_of_known_rank_and_one_long_token():
    tokens = torch.randn(3, 17, 4) @ torch.randn(4, 32)
    values = singular_values(tokens)
    assert ((values > 0.01 * values[:, :1]).sum(-1) == 4).all()
    torch.testing.assert_close(values[:, :4], torch.linalg.svdvals(tokens)[:, :4], rtol=1e-3, atol=1e-3)

    model = small().eval()
    with torch.no_grad():
        model.embed.pos_embed[:, 5] *= 1000
    first = audit(model, [images()]).rows[0]
    assert first["outliers"] == pytest.approx(1 / 17)


def test_coherence_of_planted_subspaces():
    step = MSSA(8, 2)
    with torch.no_grad():
        step.subspaces.weight.copy_(torch.eye(8))
    assert coherence(step) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        step.subspaces.weight[4:] = step.subspaces.weight[:4].flip(0)
    assert coherence(step) == pytest.approx(1, abs=1e-5)
    atoms = ISTA(4)
    with torch.no_grad():
        atoms.dictionary.copy_(torch.eye(4))
        atoms.dictionary[:, 1] = torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert coherence(atoms) == pytest.approx(0.6)


def test_the_published_layer_wise_measure(recorded):
    file = recorded("coding_rate_measure")
    rates = coding_rate(F.normalize(file["projected"], dim=-1), eps=0.1).sum(1)
    torch.testing.assert_close(rates.mean(), file["mean"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rates.std(), file["std"], rtol=1e-3, atol=1e-4)


def test_an_attention_step_is_measured_by_that_protocol():
    step, z = MSSA(24, 3), torch.randn(2, 9, 24)
    projected = torch.einsum("bnd,kdp->bknp", z, step.U)
    by_hand = coding_rate(F.normalize(projected, dim=-1), eps=0.1).sum(1)
    torch.testing.assert_close(step.objective(z, z), by_hand)


@pytest.mark.parametrize("name", ["vit_digits", "vit_micro_patch4_32"])
def test_a_vit_is_looked_at_without_being_held_to_anything(name):
    model = create_model(name)
    channels, height, width = model.pretrained_cfg["input_size"]
    result = audit(model, [torch.randn(3, channels, height, width)])
    assert len(result.rows) == 2 * len(model.blocks)
    assert {row["step"] for row in result.rows} == {"attention", "mlp"}
    for row in result.rows:
        assert tuple(row) == ROW_KEYS
        assert row["objective"] is row["before"] is row["descended"] is row["coherence"] is None
        assert row["coding_rate"] > 0
    assert result.verdict["descends"] is None


def test_vit_tokens_are_those_of_its_own_forward():
    model = create_model("vit_digits").eval()
    result = audit(model, [images()])
    with torch.no_grad():
        _, out = model.forward_intermediates(images(), return_prefix_tokens=True, output_fmt="NLC")
    last = torch.cat([out[-1][1], out[-1][0]], 1)
    rate = coding_rate(F.normalize(last, dim=-1), 0.1).mean().item()
    assert result.rows[-1]["coding_rate"] == pytest.approx(rate, rel=1e-4)


def test_nothing_about_the_model_changes():
    model = small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    audit(model, [images()])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_batches_do_not_matter_and_the_limit_holds():
    model = small()
    whole = audit(model, [images()])
    labels = torch.zeros(12)
    split = audit(model, [(images()[:5], labels[:5]), (images()[5:], labels[5:])])
    for one, other in zip(whole.rows, split.rows, strict=True):
        for key in ROW_KEYS[3:-1]:
            assert one[key] == pytest.approx(other[key], rel=1e-3), key
    assert audit(model, [images()], limit=7).samples == 7
    seen = []
    audit(model, [images()[:4], images()[4:]], progress=seen.append)
    assert seen == [4, 8]


def test_json_holds_everything(tmp_path):
    result = pellucid.audit(small(), [images()], data="noise")
    result.to_json(tmp_path / "audit.json")
    read = json.loads((tmp_path / "audit.json").read_text())
    assert read == result.to_dict()
    assert {"model", "data", "samples", "rows", "verdict"} <= read.keys()
    assert (read["data"], read["samples"]) == ("noise", 12)
    assert "R^c(Z | U)" in result.table()


def test_what_cannot_be_audited_says_so():
    with pytest.raises(DataError, match="no images"):
        audit(small(), [])
    with pytest.raises(ConfigError, match="cannot look inside Sequential"):
        audit(nn.Sequential(nn.Conv2d(1, 2, 3)), [images()])
