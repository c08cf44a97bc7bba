"""Language models: what they cannot see, what padding does, and what their names build."""

import re

import pytest
import torch
from torch.nn import functional as F

from pellucid.errors import CheckpointError, ConfigError
from pellucid.models import CRATELM, LanguageModel, ToSTLM, create_model, list_models, load
from pellucid.models.language import KINDS, MODELS
from pellucid.models.saved import copy_weights
from pellucid.steps import MHSA, MLP, OvercompleteISTA

SMALL = {"vocab_size": 31, "context": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}
CAUSAL = [kind for kind, (_, _, options) in KINDS.items() if options.get("causal", True)]
MASKED = [kind for kind in KINDS if kind not in CAUSAL]


def small(kind, **options):
    """Weights in general position: a fresh model's layer scales of 1e-5 would hide a layer."""
    model = create_model(f"{kind}_bytes", **{**SMALL, **options})
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.copy_(parameter + 0.2 * noise)
    return model.eval()


def ids(*shape, seed=0):
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(seed))


# --- what they see ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", CAUSAL)
def test_a_later_token_changes_no_bit_of_what_came_before(kind, training):
    model, text = small(kind).train(training), ids(2, 16)
    with torch.no_grad():
        scores = model(text)
        for t in range(16):
            other = text.clone()
            other[:, t] = (other[:, t] + 1) % 31
            changed = model(other)
            assert torch.equal(changed[:, :t], scores[:, :t])
            assert not torch.equal(changed[:, t], scores[:, t])
            if t < 15:
                assert not torch.equal(changed[:, t + 1 :], scores[:, t + 1 :])


@pytest.mark.parametrize("kind", CAUSAL)
def test_no_gradient_comes_from_what_is_still_to_come(kind):
    model, text = small(kind), ids(1, 10)
    z = model.embed(text, torch.arange(10)[None]).detach().requires_grad_()
    model.embed.forward = lambda *_: z
    model(text)[0, 5].square().sum().backward()
    reached = z.grad.abs().amax((0, 2)) > 0
    assert reached.tolist() == [True] * 6 + [False] * 4


@pytest.mark.parametrize("kind", MASKED)
def test_a_masked_model_sees_all(kind):
    model, text = small(kind), ids(1, 10)
    other = text.clone()
    other[0, 7] = (other[0, 7] + 1) % 31
    with torch.no_grad():
        assert ((model(other) - model(text)).abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    model, lengths = small(kind), [9, 4, 1]
    real = torch.arange(9) < torch.tensor(lengths)[:, None]
    text = ids(3, 9)
    with torch.no_grad():
        together = model(text.where(real, 30), real)
        for row, n, scores in zip(text, lengths, together, strict=True):
            torch.testing.assert_close(scores[:n], model(row[None, :n])[0], rtol=1e-4, atol=1e-5)


def test_a_masked_model_takes_padding_anywhere():
    model, text = small("crate_bert", sparsification="none"), ids(1, 6)
    real = torch.tensor([[False, True, True, False, True, True]])
    with torch.no_grad():
        other = text.where(real, 7)
        torch.testing.assert_close(model(other, real)[real], model(text, real)[real])
        assert not torch.allclose(model(other)[real], model(text)[real])


# --- what they are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_steps_are_recorded(kind):
    model, text, records = small(kind).train(), ids(4, 16), []
    scores = model(text, on_step=records.append)
    assert scores.shape == (4, 16, 31)
    F.cross_entropy(scores.flatten(0, 1), text.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert [record.layer for record in records] == ([1, 2] if "aot" in kind else [1, 1, 2, 2])
    for record in records:
        assert torch.equal(record.step(record.z, record.x), record.z_next)
        if record.step.objective_name is not None:
            before, after = record.before_and_after()
            assert before.shape == after.shape == (4,)
            assert ("Z_<=t" in record.step.objective_name) == (model.causal and record.name == "compress")


def test_a_fresh_model_learns_a_short_text():
    """Which word follows which, from one line: the loss of each kind falls to a fraction."""
    text = ids(1, 16).repeat(2, 1)
    for kind in ("crate_gpt", "crate_alpha_gpt", "tost_gpt", "gpt2"):
        torch.manual_seed(0)
        model = create_model(f"{kind}_bytes", **SMALL)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(40):
            loss = F.cross_entropy(model(text)[:, :-1].flatten(0, 1), text[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.4 * losses[0], kind


@pytest.mark.parametrize("kind", ["crate_gpt", "tost_gpt", "gpt2", "crate_bert"])
def test_recomputed_layers_give_the_same_gradients(kind):
    model, text = small(kind).train(), ids(2, 8)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(text, text >= 0).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("kind", ["crate_alpha_gpt", "tost_gpt", "gpt2"])
def test_compiles_without_a_graph_break(kind):
    model, text = small(kind), ids(2, 8)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(text), model(text), rtol=1e-4, atol=1e-4)


def test_scores_are_read_off_the_words():
    causal, masked = small("crate_gpt"), small("crate_bert")
    tokens = torch.randn(2, 3, 24)
    torch.testing.assert_close(causal.forward_head(tokens), tokens @ causal.embed.words.weight.T)
    head = masked.head
    inner = head.norm(F.gelu(tokens @ head.dense.weight.T + head.dense.bias))
    expected = inner @ masked.embed.words.weight.T + head.bias
    torch.testing.assert_close(masked.forward_head(tokens), expected)


def test_black_boxes_begin_as_in_gpt2():
    model = create_model("gpt2_bytes")
    assert model.layers[0]["sparsify"].fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.layers[0]["sparsify"].fc2.weight.std().item() == pytest.approx(0.02 / 10**0.5, rel=0.05)
    assert model.layers[3]["compress"].output.weight.std().item() == pytest.approx(0.02 / 10**0.5, rel=0.05)


# --- names ------------------------------------------------------------------------------------------------

PARAMETERS = {"tost_gpt_small": 110.38, "gpt2_small": 124.48, "gpt2_medium": 354.87, "gpt2_large": 774.09}


def test_sizes():
    """ToST's as published; of the baseline GPT-2's own, with the vocabulary in whole sixty-fours."""
    for name in list_models("text"):
        with torch.device("meta"):
            model = create_model(name)
        count = sum(parameter.numel() for parameter in model.parameters())
        if name in PARAMETERS:
            assert count / 1e6 == pytest.approx(PARAMETERS[name], abs=0.006)
        if name.endswith("_bytes"):
            assert count == pytest.approx(1.03e6, rel=0.05), name


def test_names_are_those_of_text_only():
    assert set(list_models("text")) == set(MODELS)
    assert not set(list_models("text")) & set(list_models())
    assert isinstance(create_model("crate_gpt_bytes"), CRATELM)
    assert isinstance(create_model("tost_gpt_bytes"), ToSTLM)
    alpha = create_model("crate_alpha_gpt_bytes").layers[0]["sparsify"]
    assert isinstance(alpha, OvercompleteISTA)
    assert alpha.residual
    assert alpha.output is not None
    assert [type(s) for s in create_model("gpt2_bytes").layers[0].values()] == [MHSA, MLP]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("crate_gpt_smal", {}, "did you mean 'crate_gpt_small'"),
        ("crate_gpt_small", {"contxt": 3}, "unknown model option 'contxt' .*'context'"),
        ("crate_gpt_small", {"num_classes": 10}, "reads text, not images"),
        ("crate_gpt_small", {"pretrained": True}, "no published weights"),
        ("crate_gpt_small", {"num_heads": 5}, "crate_gpt_small: dim 768 is not divisible"),
        ("crate_gpt_bytes", {"compression": "exact"}, "compression is 'exact'; known"),
        ("tost_gpt_bytes", {"sparsification": "none"}, "sparsification is 'none'; known"),
        ("crate_gpt_bytes", {"sparsification": "none", "overcomplete": 0}, "overcomplete is 0"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_cannot_be_built(name, options, message):
    with pytest.raises(ConfigError, match=message):
        create_model(name, **options)


@pytest.mark.parametrize(
    ("kind", "text", "real", "message"),
    [
        ("crate_gpt", torch.zeros(1, 17, dtype=torch.long), None, "17 tokens, .* context of 16"),
        ("crate_gpt", torch.zeros(1, 0, dtype=torch.long), None, "no tokens"),
        ("tost_gpt", torch.tensor([[3, 31]]), None, "tokens from 3 to 31, and the vocabulary has 31"),
        ("tost_gpt", torch.tensor([[-1, 3]]), None, "tokens from -1"),
        ("crate_gpt", torch.zeros(1, 2, dtype=torch.long), [[False, True]], "padding in front"),
        ("crate_bert", torch.zeros(1, 2, dtype=torch.long), [[False, False]], "padding alone"),
    ],
)
def test_what_cannot_be_read(kind, text, real, message):
    with pytest.raises(ConfigError, match=message):
        small(kind)(text, None if real is None else torch.tensor(real))


def test_whoever_asks_a_language_model_for_images_is_told():
    with pytest.raises(ConfigError, match="crate_gpt_bytes reads text, not images"):
        _ = create_model("crate_gpt_bytes").pretrained_cfg


# --- on disk ----------------------------------------------------------------------------------------------


def save(model, folder):
    import json

    from safetensors.torch import save_file

    from pellucid.models.saved import describe_text_model

    weights = {key: value.clone() for key, value in model.state_dict().items()}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(describe_text_model(model, weights)))


@pytest.mark.parametrize("kind", ["crate_gpt", "tost_gpt", "crate_bert"])
def test_saved_and_loaded(kind, tmp_path):
    model, text = small(kind), ids(2, 9)
    save(model, tmp_path / "model")
    again = load(tmp_path)
    assert isinstance(again, LanguageModel)
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(text), model(text))
    fresh = create_model(model.architecture, **model.model_args)
    copy_weights(fresh, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="no classifier"):
        copy_weights(fresh, tmp_path, new_head=True)


def test_a_damaged_config_is_refused(tmp_path):
    save(small("crate_gpt"), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    for good, bad, message in (
        ('"crate_gpt_bytes"', '"crate_gpt_bites"', "not a model's config|unknown architecture"),
        ('"context": 16', '"context": 8', "wrong shape"),
        ('"context": 16', '"checkpoint_path": 16', "refused"),
    ):
        text = config.read_text()
        config.write_text(text.replace(good, bad))
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)
        config.write_text(text)


# --- the command line -------------------------------------------------------------------------------------


def run(capsys, *argv):
    from pellucid.cli import main

    capsys.readouterr()
    code = main([str(word) for word in argv])
    return code, *capsys.readouterr()


def test_models_lists_them(capsys):
    code, out, _ = run(capsys, "models", "gpt_small")
    assert code == 0
    assert re.search(r"crate_gpt_small +60\.701 M parameters   text, 1,024 tokens of 50,304 words", out)
    assert "tost_gpt_small" in out


def test_commands_on_images_refuse_them(tmp_path, capsys):
    from PIL import Image

    save(small("crate_gpt"), tmp_path / "run" / "model")
    picture = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(picture)
    for argv in (
        ["train", "digits", "--model", "crate_gpt_bytes", "--out", tmp_path / "out"],
        ["compare", "digits", "--models", "crate_digits", "crate_gpt_bytes", "--out", tmp_path / "both"],
        ["predict", tmp_path / "run" / "model", picture],
    ):
        code, _, err = run(capsys, *argv)
        assert code == 2, argv
        assert err.startswith("error: crate_gpt_bytes reads text, not images"), (argv, err)
    for model in (tmp_path / "run" / "model", "crate_gpt_bytes"):
        code, _, err = run(capsys, "export", model, "--out", tmp_path / "x.onnx")
        assert code == 2
        assert "reads text - give --format transformers, and a folder for --out" in err
    for command in ("audit", "evaluate"):  # they look at text too, which takes a tokenizer
        code, _, err = run(capsys, command, tmp_path / "run" / "model", "digits")
        assert code == 4
        assert "has no tokenizer.json, so that its words are only numbers" in err
    code, _, err = run(capsys, "bench", "--models", "crate_gpt_bytes")
    assert code == 2
    assert err.startswith("error: crate_gpt_bytes has no published arithmetic")
