"""Language models in the page: what it answers about them, what is typed, and what it refuses."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from pellucid.data import ByteTokenizer, TextData, TextSet
from pellucid.data.words import END, MASK
from pellucid.errors import ConfigError, DataError
from pellucid.glass import worded
from pellucid.glass.answers import Answers, Subject, bundle, samples_of
from pellucid.glass.feed import text_windows
from pellucid.glass.guard import Guard
from pellucid.glass.language import audit_text
from pellucid.glass.opening import Kept, answers_of, open_target
from pellucid.glass.packed import unpack
from pellucid.glass.report import render
from pellucid.glass.server import application
from pellucid.measure.language import lens
from pellucid.models import create_model
from pellucid.training import open_run

PORT = 8517
TOKEN = "a-token-of-the-tests"
WORDS = ByteTokenizer()
TINY = {"depth": 2, "embed_dim": 16, "num_heads": 2, "context": 48}


def texts_of(lines: list[str], names: tuple[str, ...] = ()) -> TextData:
    data = [line.encode() for line in lines]
    ids = np.concatenate([WORDS.encode(text) for text in data]).astype(np.uint16)
    sizes = np.array([len(text) for text in data])
    labels = torch.tensor([i % len(names) if names else -1 for i in range(len(data))])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    part = TextSet(ids, starts, sizes, labels, [f"day{i}.txt" for i in range(len(data))])
    return TextData("days", part, part, WORDS, list(names), (), "0" * 64)


LINES = [f"And the evening and the morning were day {i}: grüße.\n" * 2 for i in range(5)]


def subject(name: str, texts: TextData, **options: object) -> Subject:
    torch.manual_seed(0)
    model = create_model(name, **{**TINY, **options}).eval()
    with torch.no_grad():
        model.embed.words.weight.mul_(20)  # nothing is learnt, but nothing is small either
    model.label_names = list(texts.class_names)
    return Subject(model, name, texts, {}, WORDS, text_windows(model, texts))


@pytest.fixture(scope="module")
def texts() -> TextData:
    return texts_of(LINES)


@pytest.fixture
def answers(texts: TextData) -> Answers:
    opened = [subject(name, texts) for name in ("crate_overcomplete_gpt_bytes", "gpt2_bytes")]
    return Answers("t", opened, samples_of(opened), takes_inputs=True, audit_limit=3)


def client_of(answers: Answers | Kept) -> TestClient:
    headers = {"authorization": f"Bearer {TOKEN}"}
    guard = Guard(application(answers), PORT, TOKEN)
    return TestClient(guard, base_url=f"http://127.0.0.1:{PORT}", headers=headers)


@pytest.fixture
def client(answers: Answers) -> TestClient:
    return client_of(answers)


def read(client: TestClient, path: str):
    response = client.get(f"/api/{path}")
    assert response.status_code == 200, response.text
    return unpack(response.content)


def send(client: TestClient, text: object, kind: str = "application/json"):
    content = text if isinstance(text, bytes) else json.dumps({"text": text}).encode()
    return client.post("/api/inputs", content=content, headers={"content-type": kind})


# What it answers


def test_every_answer_is_what_was_measured(client, answers, texts):
    overview = read(client, "overview")
    assert [(m["label"], m["reads"], m["causal"]) for m in overview["models"]] == [
        ("CRATE, overcomplete", "text", True), ("GPT-2", "text", True),
    ]  # fmt: skip
    first = overview["inputs"][0]
    assert (first["kind"], first["thumb"], first["begins"][:7]) == ("text", None, "And the")
    look = read(client, "looks/0/0")
    said = texts.test.document(0)[:47].tolist()
    assert look["words"] == [END, *map(WORDS.piece, said)]
    assert (look["pixels"], look["grid"], look["prefix"], look["guesses"]) == (None, None, [], [])
    np.testing.assert_array_equal(look["norms"], answers.look(0, 0)["norms"].numpy())
    layer = read(client, "looks/0/0/layers/2")
    np.testing.assert_array_equal(layer["attention"], answers.layer(0, 0, 2)["attention"].numpy())
    assert layer["attention"].shape == (2, 48, 48)
    assert not np.triu(layer["attention"], 1).any()  # no word reads what follows it
    np.testing.assert_allclose(layer["attention"].sum(-1), 1, rtol=1e-5)
    audited = read(client, "models/0/audit")
    own = answers.subjects[0]
    assert audited["audit"] == json.loads(json.dumps(audit_text(own.model, own.windows, "days", 3)))


def test_the_lens_is_the_models_own_head_on_every_layer(client, answers):
    own = answers.subjects[0].model
    ids = torch.tensor([list(answers.inputs[0].passage.ids)])
    behind = {0: own.embed(ids, torch.arange(48)[None])}
    with torch.no_grad():
        last = own(ids)
        own.forward_features(ids, on_step=lambda record: behind.update({record.layer: record.z_next}))
        by_hand = torch.stack(
            [own.forward_head(own.norm(tokens))[0].softmax(-1) for tokens in behind.values()]
        )
    torch.testing.assert_close(by_hand[-1], last[0].softmax(-1))
    told = read(client, "looks/0/0")["lens"]
    assert told["likeliest"].shape == told["chances"].shape == (3, 48, 5)
    best = by_hand.topk(5, -1)
    np.testing.assert_allclose(told["chances"], best.values, rtol=1e-5)
    names = np.array(told["words"], dtype=object)[told["likeliest"]]

    def spelt(i: int) -> str:
        return END if i == 256 else chr(i) if i < 128 else f"\\x{i:02x}"

    for layer, place in ((0, 0), (1, 7), (2, 47)):
        assert names[layer, place].tolist() == [spelt(i) for i in best.indices[layer, place].tolist()]
    follows = by_hand[:, torch.arange(47), ids[0, 1:]]
    np.testing.assert_allclose(told["own"][:, :47], follows, rtol=1e-5)
    row = answers.subjects[0].windows[(0, 0)][0]
    np.testing.assert_allclose(told["own"][:, 47], by_hand[:, 47, int(row.targets[0, 47])], rtol=1e-5)


def test_an_atom_fires_on_the_words_that_are_shown(client, answers):
    found = read(client, "models/0/audit")
    own = answers.subjects[0]
    assert (found["looked_at"], found["at"]) == (len(own.windows), 10)
    for layer in ("1", "2"):
        atoms = found["atoms"][layer]
        assert atoms["kind"] == "atoms"
        assert atoms["fires"].shape == atoms["score"].shape == (64,)
        assert atoms["values"].shape == (64, 4)
        assert atoms["contexts"].shape == (64, 4, 15)
        atom = int(np.nanargmax(atoms["values"][:, 0]))
        best, where = 0.0, (0, 0)
        for i in range(len(own.windows)):
            seen: list = []
            ids = own.windows[(i, 0)][0].ids
            counts = own.windows[(i, 0)][0].targets[0] >= 0
            with torch.no_grad():
                own.model.forward_features(ids, on_step=seen.append)
                record = next(r for r in seen if r.layer == int(layer) and r.name == "sparsify")
                codes = record.step.code(record.z)[0, :, atom].masked_fill(~counts, 0)
            if float(codes.max()) > best:
                best, where = float(codes.max()), (i, int(codes.argmax()))
        assert atoms["values"][atom, 0] == pytest.approx(best, rel=1e-5)
        shown = atoms["contexts"][atom, 0]
        ids = own.windows[(where[0], 0)][0].ids[0].tolist()
        first = where[1] - 10
        words = [
            worded.one_by_one(WORDS, [ids[k]])[0] if 0 <= k < len(ids) else None
            for k in range(first, first + 15)
        ]
        assert [found["words"][k - 1] if k else None for k in shown] == words
    assert read(client, "models/1/audit")["atoms"]["1"]["kind"] == "units"


def test_a_bundle_holds_the_very_answers(answers, client, tmp_path):
    path = tmp_path / "t.pellucid"
    path.write_bytes(bundle(answers))
    kept = client_of(open_target(str(path)))
    for question in ("looks/0/1", "looks/1/2/layers/2", "models/0/audit"):
        assert kept.get(f"/api/{question}").content == client.get(f"/api/{question}").content
    assert send(kept, "x").status_code == 404


# What is typed


def test_a_passage_that_is_typed(client, answers):
    response = send(client, "In the\tbeginning ü\x00\n")
    assert response.status_code == 201
    number = response.json()["input"]
    shown = next(each for each in read(client, "overview")["inputs"] if each["id"] == number)
    assert (shown["dropped"], shown["kind"], shown["name"]) == (True, "text", "In the beginning ü\\x00")
    assert shown["begins"] == "In the\tbeginning \\xc3\\xbc\x00\n"
    look = read(client, f"looks/1/{number}")
    assert look["words"] == [END, *"In the\tbeginning ", "\\xc3", "\\xbc", "\x00", "\n"]
    assert look["norms"].shape[1] == 22
    assert np.isnan(look["lens"]["own"][:, -1]).all()
    assert np.isfinite(look["lens"]["own"][:, :-1]).all()
    assert read(client, f"looks/0/{number}/layers/1")["attention"].shape == (2, 22, 22)


def test_a_special_word_that_is_typed_is_text(client):
    number = send(client, END).json()["input"]
    assert read(client, f"looks/0/{number}")["words"] == [END, *END]


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"", 422, "no JSON"),
        (b"{", 422, "no JSON"),
        (b"\xff\xfe\x00", 422, "no JSON"),
        (b"[" * 20_000, 422, "no JSON"),
        (b'{"text": ' + b"9" * 9999 + b"}", 422, "no JSON"),
        (b'"a text"', 422, "expected"),
        (b'{"text": 1}', 422, "expected"),
        (b'{"text": null}', 422, "expected"),
        (b'{"words": "x"}', 422, "expected"),
        (b'{"text": "x", "path": "/etc/passwd"}', 422, "expected"),
        (b'{"text": ""}', 422, "no text - type some"),
        (b'{"text": "\\ud800"}', 422, "half a character"),
        (json.dumps({"text": "x" * 48}).encode(), 422, "49 words, and 48 are looked at at most - shorten it"),
        (json.dumps({"text": "x" * 20_000}).encode(), 422, "20000 characters, and 16384 are read at most"),
        (json.dumps({"text": "x" * 70_000}).encode(), 413, "larger than 64 kB"),
    ],
    ids=["empty", "cut", "bytes", "deep", "long number", "string", "number", "null", "other", "more",
         "no text", "half", "long", "longer", "too long"],
)  # fmt: skip
def test_what_is_no_passage_is_refused(client, answers, content, status, said):
    count = len(answers.inputs)
    response = send(client, content)
    assert response.status_code == status
    assert said in response.json()["error"]
    assert len(answers.inputs) == count


def test_only_json_is_taken_and_only_with_the_token(client, answers):
    count = len(answers.inputs)
    for kind in ("text/plain", "application/octet-stream", "application/x-www-form-urlencoded", ""):
        assert send(client, "x", kind).status_code == 415
    del client.headers["authorization"]
    assert send(client, "x").status_code == 403
    client.cookies.set(f"pellucid-{PORT}", TOKEN)
    assert send(client, "x").status_code == 403  # a cookie alone changes nothing
    assert len(answers.inputs) == count


def test_who_types_does_not_wait_for_an_audit(client, answers):
    done = threading.Event()
    with answers._lock:  # held while something is measured
        worker = threading.Thread(target=lambda: (send(client, "x"), client.get("/glass.css"), done.set()))
        worker.start()
        assert done.wait(10)
    worker.join()
    assert answers.inputs[max(answers.inputs)].name == "x"


# Other models


def test_a_masked_model_is_asked_for_hidden_words(texts):
    opened = [subject("crate_bert_bytes", texts)]
    answers = Answers("t", opened, samples_of(opened), takes_inputs=True, audit_limit=3)
    client = client_of(answers)
    assert read(client, "overview")["models"][0]["causal"] is False
    look = read(client, "looks/0/0")
    hidden = [k for k, word in enumerate(look["words"]) if word == MASK]
    told = opened[0].windows[(0, 0)][0].targets[0]
    assert hidden
    assert set(hidden) <= set(np.flatnonzero((told >= 0).numpy()).tolist())
    assert np.isfinite(look["lens"]["own"][:, hidden]).all()
    assert np.isnan(look["lens"]["own"][:, np.flatnonzero((told[:48] < 0).numpy())]).all()
    number = send(client, f"a{MASK}b{MASK}").json()["input"]
    look = read(client, f"looks/0/{number}")
    assert look["words"] == [END, "a", MASK, "b", MASK]
    with torch.no_grad():
        scores = opened[0].model(torch.tensor([[256, 97, 256, 98, 256]]))[0].softmax(-1)
    np.testing.assert_allclose(look["lens"]["chances"][-1], scores.topk(5).values, rtol=1e-5)


def test_one_that_classifies_says_classes():
    texts = texts_of(LINES, ("law", "gospel"))
    opened = [subject("crate_gpt_bytes", texts, num_labels=2)]
    answers = Answers("t", opened, samples_of(opened), takes_inputs=True, audit_limit=3)
    assert [each.label for each in answers.inputs.values()] == ["law", "gospel", "law", "gospel", "law"]
    look = answers.look(0, 1)
    assert look["lens"] is None
    with torch.no_grad():
        scores = opened[0].model(opened[0].tensor(answers.inputs[1]))[0].softmax(-1)
    assert {g["name"]: g["share"] for g in look["guesses"]} == {
        name: pytest.approx(float(share)) for name, share in zip(("law", "gospel"), scores, strict=True)
    }
    with pytest.raises(ConfigError, match="look at its classes"):
        lens(opened[0].model, torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize("name", ["crate_aot_gpt_bytes", "tost_gpt_bytes", "crate_alpha_gpt_bytes"])
def test_every_kind_has_every_view(name, texts):
    opened = [subject(name, texts)]
    answers = Answers("t", opened, samples_of(opened)[:1], audit_limit=2)
    kept = unpack(bundle(answers))["answers"]
    assert {"looks/0/0", "looks/0/0/layers/1", "looks/0/0/layers/2", "models/0/audit"} <= kept.keys()
    layer = kept["looks/0/0/layers/1"]
    assert (layer["membership"] is not None) == name.startswith("tost")
    assert (kept["models/0/audit"]["atoms"] == {}) == name.startswith("crate_aot")


# Opened


def test_a_run_on_text_is_opened_with_what_stands_beside_it(text_run: Path, tmp_path: Path):
    (tmp_path / "long.txt").write_text("ü" * 100, encoding="utf-8")
    answers = open_target(str(text_run), [tmp_path / "long.txt"])
    assert isinstance(answers, Answers)
    assert [subject.name for subject in answers.subjects] == ["crate_gpt_bytes", "gpt2_bytes"]
    assert answers.takes == "text"
    assert answers.inputs[0].name == "long.txt"
    assert len(answers.inputs[0].passage.ids) == 48
    assert len(answers.inputs) > 1
    about = answers.overview()["models"][0]
    assert about["audited"]
    assert about["bits_per_byte"] == open_run(text_run).measures["bits per byte"]
    assert answers.look(1, 1)["lens"] is not None
    assert answers.audit(0)["audit"]["data"] == "stories"
    of_folder = open_target(str(text_run / "model"))
    assert isinstance(of_folder, Answers)
    assert of_folder.audit(0) == {"audit": None, "atoms": {}, "gallery": []}
    number = of_folder.type("words")
    assert of_folder.look(0, number)["words"][1:] == list("words")


def opening(client: TestClient, run: str, kind: str = "application/json"):
    return client.post(f"/api/runs/{run}", content=b"{}", headers={"content-type": kind})


def test_another_run_of_the_folder_is_opened_beside(text_run: Path, tmp_path: Path):
    (tmp_path / "stories").symlink_to(text_run, target_is_directory=True)  # leads out of the folder
    going = tmp_path / "going"
    going.mkdir()
    (going / "config.yaml").write_text("model: crate_gpt_bytes\nobjective: causal-lm\ndata: stories\n")
    answers = open_target(str(text_run), beside=[], runs=text_run)
    assert isinstance(answers, Answers)
    client = client_of(answers)
    runs = {run["name"]: run["id"] for run in read(client, "runs")["runs"]}
    overview = read(client, "overview")
    assert (len(overview["models"]), overview["opens_runs"]) == (1, True)
    assert opening(client, runs["stories"]).json() == {"model": 0}  # it is open
    assert opening(client, runs["beside-gpt2_bytes"], "text/plain").status_code == 415
    assert len(answers.subjects) == 1
    for _ in range(2):
        assert opening(client, runs["beside-gpt2_bytes"]).json() == {"model": 1}
    models = read(client, "overview")["models"]
    assert [(model["name"], model["audited"]) for model in models] == [
        ("crate_gpt_bytes", True), ("gpt2_bytes", True),
    ]  # fmt: skip
    assert read(client, "looks/1/0")["words"] == read(client, "looks/0/0")["words"]
    for wrong in ("0123456789ab", "..", "%2e%2e", "stories"):
        assert opening(client, wrong).status_code == 404
    answers.shelf.root = tmp_path
    (run,) = read(client, "runs")["runs"]  # not what the link leads to
    response = opening(client, run["id"])
    assert response.status_code == 422
    assert "going" in response.json()["error"]
    answers.subjects *= 4
    assert "8 models are open already" in opening(client, run["id"]).json()["error"]
    del client.headers["authorization"]
    assert opening(client, run["id"]).status_code == 403


def test_a_report_holds_the_page(text_run: Path, make_bundle):
    run = open_run(text_run)
    texts = open_target(str(text_run)).subjects[0].data
    told = answers_of([run], texts, [None])
    assert told is not None
    html = render(make_bundle(task="next"), bundle(told, budget=200_000, half=True))
    assert '<section id="inside"' in html
    assert "Click a word, a head, an atom" in html


def test_what_cannot_be_shown_together_is_refused(text_run: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="words that are only numbers - name a run"):
        open_target("crate_gpt_small")
    fresh = open_target("crate_gpt_bytes")
    assert fresh.overview()["models"][0]["fresh"]
    with pytest.raises(ConfigError, match="reads texts, crate_digits reads images - show them one by one"):
        open_target("crate_digits", beside=[text_run])
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"bad\.txt: "):
        open_target(str(text_run), [tmp_path / "bad.txt"])
