"""Published language models: ToST against what its program gave, CRATE's layouts against their arithmetic."""

import math

import pytest
import torch
from torch.nn import functional as F

import pellucid
from pellucid.cli import main
from pellucid.errors import CheckpointError, ConfigError
from pellucid.models import CRATELM, ToSTLM, create_model, from_published, generate, read_published
from pellucid.models.published import open_published
from pellucid.steps import ISTA, OvercompleteISTA, UntiedCausalTSSA


@pytest.fixture
def record(recorded):
    return recorded("tost_lang")


def state_of(record):
    return {key.removeprefix("state/"): value for key, value in record.items() if key.startswith("state/")}


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


# --- ToST -------------------------------------------------------------------------------------------------


def test_tost_gives_the_recorded_scores_and_loss(record):
    model = from_published(state_of(record))
    assert type(model) is ToSTLM
    assert (model.context, model.vocab_size, len(model.layers)) == (32, 65, 2)
    step = model.layers[1]["compress"]
    assert isinstance(step, UntiedCausalTSSA)
    assert torch.equal(step.offset, record["state/transformer.h.1.attn.denom_bias"][..., 0])
    for mode in (model.train(), model.eval()):
        scores = mode(record["ids"])
        close(scores, record["logits"])
        loss = F.cross_entropy(scores.flatten(0, 1), record["targets"].flatten())
        assert loss.item() == pytest.approx(record["loss"].item(), rel=1e-6)
    rebuilt = create_model(model.architecture, **model.model_args)
    rebuilt.load_state_dict(model.state_dict())


def test_every_part_of_the_recorded_tost_matters(record):
    """The record is met because of each of its tensors: changed, none leaves the scores as they are."""
    state = state_of(record)
    for key, value in state.items():
        if key == "lm_head.weight":
            continue
        changed = {**state, key: value + 0.1 * torch.randn_like(value)}
        if key == "transformer.wte.weight":
            changed["lm_head.weight"] = changed[key]
        with torch.no_grad():
            scores = from_published(changed)(record["ids"])
        assert (scores - record["logits"]).norm() > 1e-4 * record["logits"].norm(), key


def test_tost_writes_the_same_with_its_state_as_without(record):
    model, prompts = from_published(state_of(record)).eval(), [record["ids"][0, :3], record["ids"][1, :9]]
    fast, slow = (generate(model, prompts, 23, temperature=0.0, cache=cache) for cache in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))


def test_tost_without_biases_as_its_published_sizes_are(record):
    state = {k: v for k, v in state_of(record).items() if not k.endswith(".bias")}
    model = from_published(state)
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    model(record["ids"]).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tost_takes_no_more_tokens_than_its_offsets(record):
    model = from_published(state_of(record))
    with pytest.raises(ConfigError, match="33 tokens, and the model was built for a context of 32"):
        model(torch.zeros(1, 33, dtype=torch.long))


# --- CRATE ------------------------------------------------------------------------------------------------

DIM, HEADS, WORDS, CONTEXT = 12, 3, 17, 8


def crate_state(atoms, final_norm=True, layers=2):
    """Random tensors in the names and shapes of crate-lm."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator) / 3

    state = {"transformer.wte.weight": normal(WORDS, DIM), "transformer.wpe.weight": normal(CONTEXT, DIM)}
    for i in range(layers):
        at = f"transformer.h.{i}."
        state |= {f"{at}attn.c_attn.weight": normal(DIM, DIM), f"{at}ista.weight": normal(atoms, DIM)}
        state |= {f"{at}attn.c_proj.weight": normal(DIM, DIM), f"{at}attn.c_proj.bias": normal(DIM)}
        for norm in ("prenorm_1", "prenorm_2"):
            state |= {f"{at}{norm}.weight": 1 + normal(DIM), f"{at}{norm}.bias": normal(DIM)}
    if final_norm:
        state |= {"transformer.ln_f.weight": 1 + normal(DIM), "transformer.ln_f.bias": normal(DIM)}
    return {**state, "lm_head.weight": state["transformer.wte.weight"].clone()}


def crate_scores(state, ids):
    """What the layout means, token by token and head by head, from its description."""

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    z = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][: len(ids)]
    for i in range(2):
        at, eta, lam = f"transformer.h.{i}", 0.1, 0.1
        w = norm(z, f"{at}.prenorm_1") @ state[f"{at}.attn.c_attn.weight"].T
        mixed = torch.zeros_like(w)
        for rows in torch.arange(DIM).chunk(HEADS):
            for t in range(len(ids)):
                seen = w[: t + 1, rows]
                weights = (seen @ w[t, rows] / math.sqrt(DIM // HEADS)).softmax(0)
                mixed[t, rows] = weights @ seen
        z = z + mixed @ state[f"{at}.attn.c_proj.weight"].T + state[f"{at}.attn.c_proj.bias"]
        x, W = norm(z, f"{at}.prenorm_2"), state[f"{at}.ista.weight"]
        if len(W) == DIM:  # atoms in columns, one step from the token itself, which it becomes
            z = (x + eta * (x - x @ W.T) @ W - eta * lam).clamp_min(0)
        else:  # atoms in rows, two steps from zero, spoken back
            code = (eta * x @ W.T - eta * lam).clamp_min(0)
            code = (code + eta * (x - code @ W) @ W.T - eta * lam).clamp_min(0)
            z = code @ W
    if "transformer.ln_f.weight" in state:
        z = norm(z, "transformer.ln_f")
    return z @ state["transformer.wte.weight"].T


@pytest.mark.parametrize(("atoms", "final_norm", "sparsify", "name"), [
    (DIM, False, ISTA, "crate_gpt_small"), (4 * DIM, True, OvercompleteISTA, "crate_overcomplete_gpt_small"),
])  # fmt: skip
def test_crate_lm_means_what_its_layout_says(atoms, final_norm, sparsify, name):
    state = crate_state(atoms, final_norm)
    wrapped = {f"_orig_mod.{key}": value for key, value in state.items()}
    wrapped |= {f"_orig_mod.transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(2)}
    opened = open_published(wrapped, num_heads=HEADS)
    model = opened.model.eval()
    assert type(model) is CRATELM
    assert model.architecture == name
    assert type(model.layers[0]["sparsify"]) is sparsify
    assert opened.ignored == tuple(f"_orig_mod.transformer.h.{i}.attn.bias" for i in range(2))
    ids = torch.randint(0, WORDS, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(model(ids), torch.stack([crate_scores(state, row) for row in ids]))
    wide = from_published({**state}, num_heads=HEADS, step_size=0.3)
    assert wide.layers[0]["sparsify"].step_size == 0.3


def test_heads_are_told_by_the_width():
    for dim, heads in ((768, 12), (1024, 16), (1280, 20), (128, 2)):
        with torch.device("meta"):
            layout = {
                k: torch.empty([dim if n == DIM else n for n in v.shape]) for k, v in crate_state(48).items()
            }
        layout = {k: torch.zeros(v.shape) for k, v in layout.items()}
        layout = {k: torch.zeros(4 * dim, dim) if k.endswith("ista.weight") else v for k, v in layout.items()}
        assert from_published(layout).model_args["num_heads"] == heads


def test_words_and_scores_must_be_tied():
    state = crate_state(DIM)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from transformer.wte.weight"):
        from_published(state, num_heads=HEADS)
    del state["lm_head.weight"]
    from_published(state, num_heads=HEADS)


def test_every_key_is_needed(record):
    for state, hints in ((state_of(record), {}), (crate_state(4 * DIM), {"num_heads": HEADS})):
        for key in state:
            if key == "lm_head.weight":
                continue
            without = {other: value for other, value in state.items() if other != key}
            with pytest.raises(
                CheckpointError, match=r"missing|unexpected|known|keys of|wrong shape|laid out as"
            ):
                from_published(without, **hints)
        with pytest.raises(CheckpointError, match=r"unexpected \(1\): transformer.h.1.extra"):
            from_published({**state, "transformer.h.1.extra": torch.zeros(1)}, **hints)


# --- files ------------------------------------------------------------------------------------------------


def test_a_file_becomes_a_folder_that_writes(record, tmp_path, capsys):
    state = {f"_orig_mod.{key}": value for key, value in state_of(record).items()}
    content = {"model": state, "model_args": {"n_layer": 2, "block_size": 32}, "iter_num": 3, "config": {}}
    torch.save(content, tmp_path / "ckpt.pt")  # noqa: TID251
    assert main(["convert", str(tmp_path / "ckpt.pt"), "-o", str(tmp_path / "tost")]) == 0
    said = capsys.readouterr().out
    assert "read: " in said
    assert "part 'model'" in said
    assert "recognised: ToST for language, as tost_gpt_small with vocab_size=65, context=32" in said
    assert "65 words" in said
    model = pellucid.load(tmp_path / "tost")
    with torch.no_grad():
        close(model(record["ids"]), record["logits"])
    assert len(pellucid.generate(model, record["ids"][0], 3)[0]) == 23
    close(from_published(read_published(tmp_path / "ckpt.pt"))(record["ids"]).detach(), record["logits"])
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    argv = ["convert", tmp_path / "ckpt.pt", "-o", tmp_path / "other", "--class-names", names]
    assert main([str(word) for word in argv]) == 2
    assert "--class-names goes with images" in capsys.readouterr().err
