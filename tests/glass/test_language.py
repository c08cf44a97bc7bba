"""From language models to a bundle that JSON can hold: what stands in it is what the models give by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pellucid.data import ByteTokenizer, TextData, TextSet, load_data
from pellucid.errors import ConfigError
from pellucid.glass import language
from pellucid.glass.feed import batches, text_windows
from pellucid.glass.language import collect_text, score_held_out, text_facts, text_label
from pellucid.glass.report import render
from pellucid.glass.spelling import pieces, spelt
from pellucid.measure import audit
from pellucid.models import create_model
from pellucid.models.language import MODELS
from pellucid.training import Run, TrainConfig

WORDS = ByteTokenizer()
TINY = {"depth": 2, "embed_dim": 16, "num_heads": 2, "context": 48}


def text_set(texts, labels=None):
    data = [text.encode() if isinstance(text, str) else text for text in texts]
    ids = np.concatenate([WORDS.encode(text) for text in data]).astype(np.uint16)
    sizes = np.array([len(text) for text in data])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    known = torch.tensor([-1] * len(data) if labels is None else labels)
    return TextSet(ids, starts, sizes, known, [f"day{i}.txt" for i in range(len(data))])


def made(names=()):
    lines = [f"And the evening and the morning were day {i}: grüße.\n" * (1 + i % 3) for i in range(12)]
    labels = [i % 2 for i in range(12)] if names else None
    train, test = text_set(lines, labels), text_set(lines[:5], labels and labels[:5])
    return TextData("days", train, test, WORDS, list(names), (), "0" * 64)


def finished(folder, name, *, num_labels=0, **options):
    """A run as training leaves it, with weights that have learnt nothing but are no longer small."""
    folder.mkdir()
    lines = [
        {"split": "train", "step": 1, "epoch": 0.5, "loss": 5.0, "accuracy": 0.1},
        {"split": "test", "step": 2, "epoch": 1.0, "loss": 4.0, "accuracy": 0.2, "bits per byte": 5.9},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.manual_seed(0)
    model = create_model(name, **{**TINY, **options}, num_labels=num_labels).eval()
    with torch.no_grad():
        model.embed.words.weight.mul_(20)
    objective = "text-classification" if num_labels else "causal-lm" if model.causal else "masked-lm"
    config = TrainConfig(data="days", model=name, out=str(folder), objective=objective)
    return Run(folder, config, model, None, 1.5)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    texts = made()
    runs = [finished(folder / name, name) for name in ("crate_overcomplete_gpt_bytes", "gpt2_bytes")]
    said = []
    return runs, texts, collect_text(runs, texts, command="pellucid train days", progress=said.append), said


def test_json_holds_it(both):
    _, _, bundle, said = both
    text = json.dumps(bundle, allow_nan=False)
    assert json.dumps(json.loads(text)) == text
    assert said[0] == "scoring crate_overcomplete_gpt_bytes"
    assert any(line.startswith("auditing gpt2_bytes") for line in said)


def test_every_field_of_the_format_is_there(both):
    _, _, bundle, _ = both
    assert {"title", "created", "version", "command", "models", "data", "config"} == bundle.keys()
    for model in bundle["models"]:
        assert {
            "name", "label", "parameters", "seconds", "facts", "learnt", "curves", "scores", "audit", "text",
        } == model.keys()  # fmt: skip
        assert {
            "task", "unit", "scores", "against", "samples", "attention", "atoms", "written",
        } == model["text"].keys()  # fmt: skip
        assert (model["text"]["task"], model["text"]["unit"]) == ("next", "byte")
        assert model["audit"]["unit"] == "texts"
        assert len(model["text"]["attention"]) == 2
        assert [len(text["layers"]) for text in model["text"]["attention"]] == [2, 2]
        assert [layer["layer"] for layer in model["text"]["atoms"]] == [1, 2]
    assert [model["label"] for model in bundle["models"]] == ["CRATE, overcomplete", "GPT-2"]
    assert [model["text"]["atoms"][0]["kind"] for model in bundle["models"]] == ["atoms", "units"]
    assert bundle["models"][0]["text"]["against"] is None


def test_scores_are_those_of_the_documents(both):
    runs, texts, bundle, _ = both
    for run, model in zip(runs, bundle["models"], strict=True):
        nats = words = 0
        for i in range(len(texts.test)):
            ids = torch.tensor([WORDS.end, *texts.test.document(i).tolist(), WORDS.end])
            for first in range(0, len(ids) - 1, TINY["context"]):
                # The last window of a document is moved back to be full, and only its new words count.
                begin = max(0, min(first, len(ids) - 1 - TINY["context"]))
                row = ids[begin : begin + TINY["context"] + 1]
                with torch.no_grad():
                    scores = run.model(row[None, :-1])[0]
                new = F.cross_entropy(scores, row[1:], reduction="none")[first - begin :]
                nats, words = nats + float(new.sum()), words + len(new)
        size = int(texts.test.sizes.sum())
        found = model["text"]["scores"]
        assert (found["words"], found["documents"], found["bytes"]) == (words, 5, size)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        assert found["bits_interval"][0] < found["bits_per_byte"] < found["bits_interval"][1]
    again = score_held_out(runs[0].model, text_windows(runs[0].model, texts))
    assert again.to_dict() == bundle["models"][0]["text"]["scores"]
    mine, theirs = (model["text"]["scores"]["bits_per_byte"] for model in bundle["models"])
    against = bundle["models"][1]["text"]["against"]
    assert against["more"] == pytest.approx(theirs - mine, rel=1e-5)
    assert against["unit"] == "bits per byte"


def test_what_words_cost_alone_is_what_counting_gives(both):
    _, texts, bundle, _ = both
    counts = torch.bincount(torch.from_numpy(texts.train.ids.astype(np.int64)), minlength=257).double()
    counts[256] = len(texts.train)
    chances = (counts + 1) / (counts + 1).sum()
    told = [*texts.test.ids.tolist(), *[256] * len(texts.test)]
    bits = -chances[told].log2().sum().item()
    data = bundle["data"]
    assert data["alone"]["bits_per_byte"] == pytest.approx(bits / texts.test.sizes.sum())
    assert (data["kind"], data["train"], data["test"], data["tokenizer"]["name"]) == ("text", 12, 5, "bytes")
    assert data["tokenizer"]["bytes_per_word"] == 1.0


def test_samples_are_the_texts_and_their_bits(both):
    runs, texts, bundle, _ = both
    windows = text_windows(runs[0].model, texts)
    shown = bundle["models"][0]["text"]["samples"]
    assert len(shown) == 4
    first = shown[0]
    assert first["name"] == windows.name(0)
    said = "".join(word["text"] for word in first["words"] if not word["special"])
    assert said == bytes(texts.test.document(0)[:48].tolist()).decode()
    ids = torch.tensor([[256, *texts.test.document(0)[:47].tolist()]])
    with torch.no_grad():
        bits = F.cross_entropy(
            runs[0].model(ids)[0],
            torch.from_numpy(texts.test.document(0)[:48].astype(np.int64)),
            reduction="none",
        ) / math.log(2)
    umlaut = next(i for i, word in enumerate(first["words"]) if word["text"] == "ü")  # of two bytes
    at = first["words"][umlaut]
    place = umlaut - 1  # the end is in front
    assert at["bits"] == pytest.approx(float(bits[place : place + 2].sum()), rel=1e-4)
    assert first["words"][0] == {"text": "<|endoftext|>", "special": True, "bits": None, "likeliest": []}
    assert first["words"][5]["bits"] == pytest.approx(float(bits[4]), rel=1e-4)
    assert len(first["words"][5]["likeliest"]) == 3
    chances = [chance for _, chance in first["words"][5]["likeliest"]]
    assert chances == sorted(chances, reverse=True)


def test_attention_of_the_chosen_word_is_whole(both):
    _, _, bundle, _ = both
    for gaze in bundle["models"][0]["text"]["attention"]:
        assert gaze["kind"] == "attention"
        assert gaze["reader"] == len(gaze["words"]) - 1
        for layer in gaze["layers"]:
            assert len(layer["heads"]) == 2
            for head in layer["heads"]:
                assert len(head) == len(gaze["words"])
                assert sum(head) == pytest.approx(1, abs=1e-3)


def test_curves_are_in_bits(both):
    _, texts, bundle, _ = both
    curves = bundle["models"][0]["curves"]
    words, size = len(texts.train.ids) + 12, texts.train.sizes.sum()
    assert curves["train"]["bits per byte"] == [pytest.approx(5.0 / math.log(2) * words / size)]
    assert curves["test"]["bits per byte"] == [5.9]


def test_what_is_written_follows_the_prompt(both):
    _, texts, bundle, _ = both
    written = bundle["models"][0]["text"]["written"]
    assert written["settings"] == {"temperature": 0.8, "top_p": 0.95, "seed": 0}
    assert [each["prompt"] for each in written["texts"]] == [
        "", "And the even", spelt(WORDS, texts.test.document(2)[:12].tolist()),
    ]  # fmt: skip


def test_the_report_shows_it(both):
    _, _, bundle, _ = both
    html = render(bundle)
    bits = bundle["models"][0]["text"]["scores"]["bits_per_byte"]
    assert f"CRATE, overcomplete needs {bits:.2f} bits for each byte of unseen text" in html
    parts = ["What surprises it", "What it writes", "What context is worth", "What its atoms respond to"]
    parts += ["Where a word looks", "GPT-2, beside it, needs", "of the texts", "pellucid train days"]
    for part in parts:
        assert part in html, part
    assert "image" not in html.split("</style>", 1)[1].split("<script>")[0].replace("data:image", "")


@pytest.mark.parametrize("name", ["crate_bert_bytes", "tost_gpt_bytes", "crate_aot_gpt_bytes"])
def test_other_models(tmp_path, name):
    texts = made()
    bundle = collect_text([finished(tmp_path / "run", name)], texts)
    json.dumps(bundle, allow_nan=False)
    text = bundle["models"][0]["text"]
    html = render(bundle)
    if name == "crate_bert_bytes":
        assert (text["task"], text["written"], text["scores"]["bits_per_byte"]) == ("masked", None, None)
        hidden = [word for word in text["samples"][0]["words"] if word["bits"] is not None]
        assert len(hidden) == text["scores"]["words"] // text["scores"]["windows"]
        assert "of the hidden bytes of unseen text" in html
        assert "bits per byte" not in bundle["models"][0]["curves"]["train"]
    if name == "tost_gpt_bytes":
        assert text["attention"][0]["kind"] == "membership"
        heads = np.array(text["attention"][0]["layers"][0]["heads"])
        np.testing.assert_allclose(heads.sum(0), 1, atol=1e-3)
        assert text["atoms"][0]["kind"] == "units"
    if name == "crate_aot_gpt_bytes":
        assert text["atoms"] == []
        assert "What its atoms respond to" not in html


def test_a_model_that_classifies(tmp_path):
    texts = made(["even", "odd"])
    run = finished(tmp_path / "run", "crate_bert_bytes", num_labels=2)
    bundle = collect_text([run], texts)
    json.dumps(bundle, allow_nan=False)
    model = bundle["models"][0]
    assert (model["text"]["task"], model["text"]["scores"]) == ("whole", None)
    assert sum(map(sum, model["scores"]["confusion"])) == 5
    assert {sample["predicted"] for sample in model["text"]["samples"]} <= {"even", "odd"}
    html = render(bundle)
    assert "of 5 test texts" in html
    assert "Accuracy by class" in html
    with pytest.raises(ConfigError, match="learnt 2 classes, days has 0 - give runs on the same data"):
        collect_text([run], made())


def test_what_does_not_belong_together_is_refused(tmp_path):
    texts = made()
    small = finished(tmp_path / "small", "crate_gpt_bytes", vocab_size=200)
    with pytest.raises(ConfigError, match="bytes has 257 words, the model knows 200 - load the texts with"):
        collect_text([small], texts)
    image = create_model("vit_digits")
    with pytest.raises(ConfigError, match="vit_digits reads images, and days is text"):
        text_windows(image, texts)
    with pytest.raises(ConfigError, match="reads text, not images"):
        batches(small.model, load_data("digits").test)


def test_batches_of_text_can_be_audited():
    texts = made()
    model = create_model("crate_gpt_bytes", **TINY).eval()
    result = audit(model, batches(model, texts, batch_size=3, limit=5), data=texts.name)
    assert (result.samples, result.unit) == (5, "texts")


def test_every_kind_has_a_name_in_print():
    named = set()
    for name in MODELS:
        if name.endswith("_bytes"):
            model = create_model(name, depth=1, embed_dim=16, num_heads=2)
            named.add(text_label(model))
            facts = dict(map(tuple, text_facts(model)))
            assert facts["depth"] == "1"
            assert facts["reads"] == (
                "each word with those before it" if model.causal else "all words at once"
            )
    assert named == set(language.LABELS.values())
    assert language.LABELS.keys() == language.KINDS.keys()


@pytest.mark.parametrize(
    "data", ["grüße 😀 a\n", b"\xff\xfe ok \xf0\x9f", "e\u0301 \U0001f9d1\u200d\U0001f680"]
)
def test_pieces_hold_every_word_once(data):
    ids = WORDS.encode(data.encode() if isinstance(data, str) else data).tolist()
    found = pieces(WORDS, [WORDS.end, *ids, WORDS.end])
    assert [piece.first for piece in found[1:]] == [piece.last + 1 for piece in found[:-1]]
    assert (found[0].special, found[-1].special, found[0].first, found[-1].last) == (
        True,
        True,
        0,
        len(ids) + 1,
    )
    if isinstance(data, str):
        assert "".join(piece.text for piece in found[1:-1]) == data
    else:
        assert spelt(WORDS, ids) == r"\xff\xfe ok \xf0\x9f"
