"""Training on text: what is learnt from, exactly resumed, and what stands in the run's folder."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import pellucid
from pellucid.data import IGNORED, ByteTokenizer, Tokens, Windows, eval_token_loader, load_text
from pellucid.errors import CheckpointError, ConfigError, Stopped
from pellucid.training import TrainConfig, open_run, train
from pellucid.training.language import CausalLM, MaskedLM, TextClassification
from pellucid.training.objective import Held
from pellucid.training.run import OBJECTIVES

TINY = {"context": 32, "embed_dim": 32, "depth": 2, "num_heads": 4}
OBJECTIVE = {"causal-lm": "crate_gpt_bytes", "masked-lm": "crate_bert_bytes"}


def story(number: int) -> str:
    """A text of a small grammar, another one for each number."""
    draw = np.random.default_rng(number)
    who, does, what = (
        ("the sun", "a river", "my brother"),
        ("saw", "took"),
        ("the stone", "all of it", "nothing"),
    )
    lines = [
        f"And {draw.choice(who)} {draw.choice(does)} {draw.choice(what)}." for _ in range(5 + number % 5)
    ]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(30):
        (folder / f"{number:02d}.txt").write_text(story(number))
    return folder


@pytest.fixture(scope="module")
def topics(tmp_path_factory):
    """Two classes that differ by the words that they use."""
    folder = tmp_path_factory.mktemp("topics")
    for name, word in (("weather", "rain wind cloud storm "), ("kitchen", "salt bread knife plate ")):
        (folder / name).mkdir()
        for number in range(24):
            draw = np.random.default_rng(number)
            words = [*draw.permutation(word.split()).tolist(), "and", "the"]
            (folder / name / f"{number}.txt").write_text(" ".join(draw.choice(words, 12).tolist()))
    return folder


def run_of(folder, out, objective="causal-lm", **options):
    options = {"model": OBJECTIVE[objective], "model_args": TINY, "batch_size": 16, "epochs": 1, **options}
    return train(str(folder), out=str(out), objective=objective, progress=False, **options)


@pytest.fixture(scope="module")
def causal(corpus, tmp_path_factory):
    return run_of(corpus, tmp_path_factory.mktemp("run") / "causal", epochs=12)


def test_it_learns_and_measures_what_it_says(causal, corpus):
    """Bits per byte by the run are those of the saved model on the held-out documents, word by word."""
    texts = load_text(corpus)
    model = pellucid.load(causal.out)
    nats = 0.0
    for i in range(len(texts.test)):
        words = torch.tensor([256, *texts.test.document(i).tolist(), 256])
        for first in range(0, len(words) - 1, 32):
            last = min(first + 32, len(words) - 1)
            start = max(0, last - 32)
            with torch.no_grad():
                scores = model(words[None, start:last])[0, first - start :]
            nats += F.cross_entropy(scores.double(), words[first + 1 : last + 1], reduction="sum").item()
    bits = nats / math.log(2) / int(texts.test.sizes.sum())
    assert causal.measures["bits per byte"] == pytest.approx(bits, rel=1e-5)
    assert causal.accuracy is None
    first = next(line for line in causal.metrics if line["split"] == "test")
    assert causal.measures["bits per byte"] < min(4.5, first["bits per byte"])  # 8 would be by chance
    assert causal.measures["perplexity"] == pytest.approx(math.exp(causal.measures["loss"]))


def test_the_folder_holds_all_that_it_takes_to_use_the_model(causal, corpus):
    assert {path.name for path in (causal.out / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    result = json.loads((causal.out / "result.json").read_text())
    texts = load_text(corpus)
    assert (result["train_documents"], result["test_documents"]) == (len(texts.train), len(texts.test))
    assert result["train_bytes"] + result["test_bytes"] == sum(len(story(i)) for i in range(30))
    again = open_run(causal.out)
    assert again.measures == causal.measures
    assert (again.config.tokenizer, again.model.vocab_size, again.model.causal) == ("bytes", 257, True)


@pytest.mark.parametrize("objective", OBJECTIVE)
@pytest.mark.parametrize("options", [{}, {"engine": "plain", "accumulate": 2}], ids=["lightning", "plain"])
def test_stopped_and_resumed_it_ends_in_the_same_bits(
    corpus, tmp_path, between_steps, differences, objective, options
):
    import os
    import signal

    run_of(corpus, tmp_path / "whole", objective, **options)
    stops = {3: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    with between_steps(stops), pytest.raises(Stopped):
        run_of(corpus, tmp_path / "run", objective, **options)
    run_of(corpus, tmp_path / "run", objective, resume=True, **options)
    assert differences(tmp_path / "run", tmp_path / "whole") == []


def test_micro_batches_do_not_change_the_gradient(corpus):
    texts = load_text(corpus)
    for objective, name in OBJECTIVE.items():
        kind = OBJECTIVES[objective]
        config = TrainConfig(data="x", objective=objective)
        windows = Windows(texts.train, texts.tokenizer, 32, **kind.reading(config))
        torch.manual_seed(0)
        learnt = kind(pellucid.create_model(name, **TINY).double())
        gradients = []
        for size in (12, 4):
            learnt.zero_grad()
            for first in range(0, 12, size):
                batch = windows.__getitems__([(k, 0) for k in range(first, first + size)])
                (learnt(*batch[:2])["loss"] / (12 // size)).backward()
            gradients.append([p.grad.clone() for p in learnt.parameters()])
        for whole, parts in zip(*gradients, strict=True):
            torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-9)


def test_the_loss_is_nats_of_a_word_over_an_epoch(corpus):
    """Over all rows of an epoch the losses of batches average to the mean of all words."""
    texts = load_text(corpus)
    windows = Windows(texts.test, texts.tokenizer, 32)
    torch.manual_seed(0)
    learnt = CausalLM(pellucid.create_model("crate_gpt_bytes", **TINY)).eval()
    with torch.no_grad():
        tokens, labels, _ = windows.__getitems__([(k, 0) for k in range(len(windows))])
        loss = learnt(tokens, labels)["loss"].item()
        scores = learnt.model(tokens.ids)
        words = F.cross_entropy(scores.flatten(0, 1), tokens.targets.flatten(), ignore_index=IGNORED)
    assert loss == pytest.approx(words.item(), rel=1e-5)
    held = Held(eval_token_loader(windows, batch_size=7), words_per_byte=windows.words / windows.text_bytes)
    found = learnt.evaluate(learnt.handed_over(), held)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert windows.words == windows.text_bytes + len(texts.test)  # and one end of each document


def test_classes_of_texts_are_learnt_from_a_masked_model(topics, tmp_path):
    first = run_of(topics, tmp_path / "masked", "masked-lm", model="crate_alpha_bert_bytes", epochs=1)
    assert set(first.measures) == {"loss", "word accuracy"}
    options = {"objective": "text-classification", "model": "crate_alpha_bert_bytes", "model_args": TINY}
    options |= {"init_from": str(first.out), "batch_size": 8, "progress": False, "out": str(tmp_path / "run")}
    with pytest.raises(CheckpointError, match=r"no classifier - give --new-head"):
        train(str(topics), **options)
    tuned = train(str(topics), **options, new_head=True, epochs=12)
    assert tuned.accuracy > 0.9
    assert tuned.model.label_names == ["kitchen", "weather"]
    assert pellucid.load(tuned.out).label_names == ["kitchen", "weather"]
    scores = tuned.model(torch.tensor([[256, *b"wind and rain and storm"]]))
    assert scores.argmax().item() == 1


def test_the_tokenizer_of_the_weights_goes_on(corpus, tmp_path):
    first = run_of(corpus, tmp_path / "first", tokenizer="bpe", vocab_size=300)
    assert first.model.vocab_size == 300
    second = run_of(corpus, tmp_path / "second", init_from=str(first.out))
    assert second.model.vocab_size == 300
    texts = [json.loads((run.out / "model" / "tokenizer.json").read_text()) for run in (first, second)]
    assert texts[0]["model"] == texts[1]["model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "crate_digits"}, "causal-lm is about text, and crate_digits reads images"),
        (
            {"model": "crate_bert_bytes"},
            "crate_bert_bytes is no causal language model - take crate_alpha_gpt",
        ),
        ({"model_args": {"vocab_size": 12}}, "model_args has vocab_size 12, the data has 257 - leave it out"),
        ({"objective": "masked-lm", "objective_args": {"mask_share": 2.0}}, "mask share 2.0"),
        (
            {"objective": "masked-lm", "objective_args": {"share": 0.2}},
            "unknown objective_args option 'share'",
        ),
        ({"data": pellucid.load_data("digits")}, "causal-lm reads text, and digits is none"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be larger than 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(corpus, tmp_path, options, message):
    options = {"objective": "causal-lm", "out": str(tmp_path / "run"), **options}
    if options["objective"] == "masked-lm":
        options["model"] = "crate_bert_bytes"
    with pytest.raises(ConfigError) as refused:
        train(options.pop("data", str(corpus)), progress=False, **options)
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_images_are_refused_text(corpus):
    with pytest.raises(ConfigError, match=r"supervised reads images"):
        train(load_text(corpus), progress=False)


def test_no_padding_no_mask():
    """A masked model is asked with a padding mask only where there is padding; the answers are the same."""
    torch.manual_seed(0)
    learnt = MaskedLM(pellucid.create_model("crate_bert_bytes", **TINY)).eval()
    ids = torch.randint(0, 256, (2, 9))
    targets = torch.full_like(ids, IGNORED)
    targets[:, 3] = 65
    whole = Tokens(ids, targets, torch.ones(2, 9, dtype=torch.bool), torch.ones(2))
    padded = Tokens(
        F.pad(ids, (0, 4), value=256),
        F.pad(targets, (0, 4), value=IGNORED),
        F.pad(whole.real, (0, 4)),
        whole.scale,
    )
    with torch.no_grad():
        torch.testing.assert_close(learnt(padded), learnt(whole))


def test_a_classifier_needs_classes():
    with pytest.raises(ConfigError, match="does not classify text"):
        TextClassification(pellucid.create_model("crate_bert_bytes", **TINY))
    assert ByteTokenizer().vocab_size == 257
