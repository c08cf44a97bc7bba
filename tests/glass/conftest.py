"""A made-up but realistic bundle: nothing here was measured."""

from __future__ import annotations

import base64
import io
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pellucid.glass.answers import Answers
from pellucid.glass.guard import Guard
from pellucid.glass.server import application, listening

OBJECTIVES = {"compress": "R^c(Z | U)", "sparsify": "LASSO"}


def picture(side: int, rng: random.Random) -> str:
    """A grey picture with a bright stroke, as a data URI."""
    y, x = np.mgrid[0:side, 0:side]
    middle, tilt = rng.uniform(0.3, 0.7) * side, rng.uniform(-0.5, 0.5)
    stroke = np.exp(-(((x - middle - tilt * (y - side / 2)) / (side / 8)) ** 2))
    file = io.BytesIO()
    Image.fromarray((255 * stroke).astype(np.uint8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def curves(rng: random.Random, best: float, classes: int) -> dict:
    """Eighty epochs that learn to ``best`` and then overfit a little; tested every fifth epoch."""
    train = [float(e) for e in range(1, 81)]
    test = train[4::5]
    start = math.log(max(classes, 2))

    def rise(epoch: float) -> float:
        return 1 - (1 - 1 / classes) * math.exp(-epoch / 9)

    return {
        "train": {
            "epoch": train,
            "loss": [start * math.exp(-e / 10) + 0.02 for e in train],
            "accuracy": [min(1.0, rise(e) + 0.005) for e in train],
        },
        "test": {
            "epoch": test,
            "loss": [start * math.exp(-e / 9) + 0.07 + e / 4000 for e in test],
            "accuracy": [best * rise(e) + rng.uniform(-0.01, 0.01) for e in test],
        },
    }


def scores(rng: random.Random, names: list[str], accuracy: float, per_class: int) -> dict:
    """Counts with a few confusions, and what follows from them."""
    n = len(names)
    matrix = [[0] * n for _ in names]
    for i in range(n):
        wrong = min(per_class, max(0, round(rng.gauss((1 - accuracy) * per_class, 1.0)))) if n > 1 else 0
        matrix[i][i] = per_class - wrong
        for _ in range(wrong):
            matrix[i][(i + rng.randint(1, min(n - 1, 5))) % n] += 1
    classes = []
    for i, name in enumerate(names):
        called = sum(row[i] for row in matrix)
        precision, recall = matrix[i][i] / max(called, 1), matrix[i][i] / per_class
        f1 = 2 * precision * recall / (precision + recall or 1)
        measured = {"precision": precision, "recall": recall, "f1": f1}
        classes.append({"name": name, "count": per_class, **measured})
    total = n * per_class
    right = sum(matrix[i][i] for i in range(n)) / total
    half = 1.96 * math.sqrt(right * (1 - right) / total) + 1 / total
    return {
        "accuracy": right,
        "interval": [right - half, min(1.0, right + half)],
        "confidence": 0.95,
        "count": total,
        "classes": classes,
        "confusion": matrix,
    }


def audit_row(rng: random.Random, layer: int, step: str, progress: float, rising: bool) -> dict:
    """One step at ``progress`` (0 to 1) through the layers; black-box steps have no objective."""
    white, first = step in OBJECTIVES, step in ("compress", "attention")
    before = (90.0 if first else 0.52) * 0.93 ** (layer - 1)
    after = before * (rng.uniform(1.02, 1.09) if rising else rng.uniform(0.82, 0.95))
    fell = rng.uniform(0.02, 0.2) if rising else rng.choice([1.0, 1.0, 0.996, 0.95])
    bound = None if first else 0.08 if rising else 0.4
    return {
        "layer": layer,
        "step": step,
        "objective": OBJECTIVES.get(step),
        "before": before if white else None,
        "after": after if white else None,
        "descended": fell if white else None,
        "coding_rate": 80.0 * 0.94**layer + (0 if first else 3),
        "nonzero": 0.6 * 0.93**layer if step == "sparsify" else 1.0,
        "rank": 34 - 22 * progress,
        "coherence": 0.1 + 0.02 * layer if white else None,
        "outliers": max(0.0, 0.002 * (layer - 2)) * (1 if white else 6),
        "step_size": 0.1 if white else None,
        "max_step_size": bound if white else None,
    }


def audit(rng: random.Random, depth: int, steps: tuple[str, str], rising: set[tuple[int, str]]) -> dict:
    """An audit whose steps fall except for the ``rising`` ones."""
    where = [(layer, step) for layer in range(1, depth + 1) for step in steps]
    rows = [audit_row(rng, *w, w[0] / depth, w in rising) for w in where]
    edges = [0.5 * i for i in range(25)]
    spectra, norms = [], []
    for layer, step in where:
        decay, mean = 0.05 + 0.06 * layer / depth, 4 + 2 * layer / depth
        spectrum = [40 * math.exp(-i * decay) for i in range(64)]
        counts = [round(900 * math.exp(-((e - mean) ** 2) / 2)) for e in edges[:-1]]
        spectra.append({"layer": layer, "step": step, "singular_values": spectrum})
        norms.append({"layer": layer, "step": step, "edges": edges, "counts": counts})
    details = [
        f"layer {r['layer']} {r['step']} rises: {r['before']:.1f} -> {r['after']:.1f}, "
        f"falls on {r['descended']:.0%} of images"
        for r in rows
        if (r["layer"], r["step"]) in rising
    ]
    text = "Not every layer descends." if rising else "Every layer descends on at least 95 % of the images."
    white = steps[0] in OBJECTIVES
    verdict = {
        "descends": not rising if white else None,
        "text": text if white else "This model states no objective.",
        "details": details,
    }
    return {
        "model": "crate_digits",
        "data": "digits, test",
        "samples": 256,
        "objectives": OBJECTIVES if white else {},
        "verdict": verdict,
        "rows": rows,
        "spectra": spectra,
        "norms": norms,
    }


def audited(rng: random.Random, depth: int, steps: tuple[str, str], rising: set, unit: str) -> dict:
    """The same of images or of texts."""
    made = audit(rng, depth, steps, rising)
    said = made["verdict"]
    told = {
        "text": said["text"].replace("images", unit),
        "details": [line.replace("images", unit) for line in said["details"]],
    }
    return {**made, "unit": unit, "verdict": {**said, **told}}


def attention(
    rng: random.Random, depth: int, heads: int, images: int, grid: int, side: int, names: list[str]
) -> dict:
    """Maps that each peak somewhere; the third image is taken for another class."""

    def head() -> list[float]:
        cx, cy, width = rng.uniform(0, grid - 1), rng.uniform(0, grid - 1), rng.uniform(0.15, 0.4) * grid
        raw = [
            math.exp(-((x - cx) ** 2 + (y - cy) ** 2) / width**2) for y in range(grid) for x in range(grid)
        ]
        return [v / sum(raw) for v in raw]

    shown = []
    for i in range(images):
        true = rng.randrange(max(len(names), 1))
        shown.append(
            {
                "png": picture(side, rng),
                "name": f"digits[{i}]",
                "label": names[true] if names else None,
                "predicted": names[(true + (i == 2)) % len(names)] if names else None,
                "grid": [grid, grid],
                "layers": [
                    {"layer": n, "heads": [head() for _ in range(heads)]} for n in range(1, depth + 1)
                ],
            }
        )
    return {"images": shown}


def without_labels(rng: random.Random, names: list[str], objective: str, state: str, side: int) -> dict:
    """What takes another place in a run without labels; without names, what is left when none is known."""

    def item(i: int) -> dict:
        label = names[i % len(names)] if names else None
        return {"name": f"digits[{i}]", "label": label, "png": picture(side, rng)}

    epochs = [float(e) for e in range(21)]
    ill = state not in ("healthy", "untrained")
    test = {
        "epoch": epochs,
        "loss": [None] * 21,
        "effective rank": [1.2 + 14 * math.exp(-e) if ill else 15 + e for e in epochs],
        "cosine": [1 - math.exp(-e - 1) if ill else 0.9 * math.exp(-e / 5) for e in epochs],
        "view cosine": [0.9] * 21,
        "norm spread": [0.05 + e / 200 for e in epochs],
        "health": ["untrained", *["healthy"] * 9, *[state] * 11],
    }
    if names:
        test["knn accuracy"] = [0.7 + 0.01 * e for e in epochs]
    train = {
        "epoch": epochs[1:],
        "loss": [-1 - e / 30 for e in epochs[1:]],
        "alignment": [0.8 + e / 200 for e in epochs[1:]],
        "rate share": [e / 25 for e in epochs[1:]],
    }
    hidden = {
        "kind": "hidden",
        "share": 0.5,
        "images": [{**item(i), "masked": picture(side, rng), "filled": picture(side, rng)} for i in range(2)],
    }
    crops = {
        "kind": "crops",
        "split": 0.4,
        "size": [64, 64],
        "small_size": [32, 32],
        "images": [
            {
                **item(i),
                **{k: [picture(side, rng) for _ in range(n)] for k, n in (("large", 2), ("small", 4))},
            }
            for i in range(2)
        ],
    }
    points = [[rng.gauss(i % 3, 0.3), rng.gauss(i % 2, 0.3), item(i)["label"]] for i in range(60)]
    return {
        "learnt": {"objective": objective, "labels": False, "settings": {"eps": 0.632, "group_size": 64}},
        "health": {"state": state, "text": f"{state}: effective rank 35.0 of 64"},
        "curves": {"train": train, "test": test},
        "scores": scores(rng, names, 0.9, 45) | {"by": "neighbours", "neighbours": 20, "train": 1347}
        if names
        else None,
        "features": {
            "width": 64,
            "images": 450,
            "effective_rank": 35.04,
            "map": {
                "shares": [0.2, 0.1],
                "points": points,
                "grid": [15, 9],
                "pictures": [{"column": i, "row": i % 9, **item(i)} for i in range(12)],
            },
            "neighbours": [
                {**item(i), "near": [{**item(i + j), "cosine": 0.99 - j / 50} for j in range(3)]}
                for i in range(2)
            ],
        },
        "views": hidden if objective == "mae" else crops,
    }


LINES = ["In", "the", "beginning", "God", "created\nthe", "heaven", "and", "the", "earth.", "ür"]


def of_text(rng: random.Random, depth: int, heads: int, task: str, index: int) -> dict:
    """What stands in the place of pictures in a run on text."""
    told = [LINES[i % len(LINES)] + " " for i in range(40)]
    hidden = {"next": 1, "masked": 7, "whole": 100}[task]

    def word(i: int) -> dict:
        given = i % hidden or not i
        likeliest = [[rng.choice(LINES), 0.5 / (k + 1)] for k in range(3)]
        return {
            "text": told[i] if i else "<|endoftext|>",
            "special": not i,
            "bits": None if given else rng.expovariate(0.4),
            "likeliest": [] if given else likeliest,
        }

    def atom(i: int) -> dict:
        contexts = [
            {"before": "In the ", "word": "beginning", "after": " God\n", "value": 3 - k / 2}
            for k in range(3)
        ]
        pushes = {
            side: [[rng.choice(LINES), rng.gauss(0, 1)] for _ in range(3)] for side in ("for", "against")
        }
        known = {"score": 0.9 - i / 50, "told_by": "word", "word": "the", "purity": 0.7, "common": 0.06}
        return {"atom": i, "fires": 0.02, "mean": 1.2, **known, "contexts": contexts, "pushes": pushes}

    weights = [[rng.random() for _ in told[:12]] for _ in range(heads)]
    gaze = {
        "name": "genesis.txt, words 0 to 40",
        "kind": "attention",
        "words": told[:12],
        "reader": 11,
        "told": "the",
        "layers": [{"layer": n, "heads": weights} for n in range(1, depth + 1)],
    }
    layers = [
        {
            "layer": n,
            "step": "sparsify",
            "kind": "units" if index else "atoms",
            "count": 512,
            "dead": n,
            "positions": 65536,
            "fires": 0.3 / n + 0.3 * (index > 0),
            "score": 0.8 / n,
            "quartiles": [0.2, 0.5, 0.9],
            "clear": 0.5,
            "clearest": [atom(i) for i in range(2)],
            "middle": [atom(i + 200) for i in range(2)],
        }
        for n in range(1, depth + 1)
    ]
    nats = 1.5 + index / 10
    bits = None if task == "masked" else nats / math.log(2)
    measured = {
        "task": task,
        "words": 5000,
        "windows": 80,
        "documents": 12,
        "nats": nats,
        "interval": [nats - 0.1, nats + 0.1],
        "bits_per_byte": bits,
        "bits_interval": None if bits is None else [bits - 0.1, bits + 0.1],
        "bytes": None if bits is None else 4988.0,
        "accuracy": 0.55,
        "accuracy_interval": [0.5, 0.6],
        "confidence": 0.95,
        "by_position": [
            {"first": 2**k, "last": 2 ** (k + 1) - 1, "nats": nats + 1 / (k + 1), "words": 80 * 2**k}
            for k in range(7)
        ],
        "perplexity": math.exp(nats),
        "perplexity_interval": [math.exp(nats - 0.1), math.exp(nats + 0.1)],
    }
    written = {
        "settings": {"temperature": 0.8, "top_p": 0.95, "seed": 0},
        "texts": [
            {"prompt": "", "text": "And the LORD\nsaid", "ended": False},
            {"prompt": "In the", "text": " beginning", "ended": True},
        ],
    }
    label = {"next": None, "masked": None, "whole": "law"}[task]
    return {
        "task": task,
        "unit": "word",
        "scores": None if task == "whole" else measured,
        "against": {"more": 0.1, "interval": [0.05, 0.15], "unit": "bits per byte"} if index else None,
        "samples": [
            {
                "name": f"genesis.txt, words {40 * i} to {40 * i + 40}",
                "label": label,
                "predicted": "gospel" if label else None,
                "words": [word(k) for k in range(40)],
            }
            for i in range(3)
        ],
        "attention": [gaze, {**gaze, "name": "exodus.txt"}],
        "atoms": layers,
        "written": written if task == "next" else None,
    }


def make(
    depth: int = 4,
    heads: int = 4,
    names: list[str] | None = None,
    models: int = 2,
    rising: tuple[tuple[int, str], ...] = ((1, "compress"),),
    images: int = 6,
    grid: int = 4,
    side: int = 8,
    per_class: int = 45,
    unlabelled: str = "",
    state: str = "healthy",
    task: str = "",
) -> dict:
    """A bundle of one CRATE and, beside it, ViTs; ``unlabelled`` names an objective without labels.

    With a ``task`` it is of language models: ``next``, ``masked`` or ``whole``.
    """
    rng = random.Random(0)
    names = [str(i) for i in range(10)] if names is None else names

    def model(index: int) -> dict:
        white = index == 0
        steps = ("compress", "sparsify") if white else ("attention", "mlp")
        best = 0.98 if white else 0.965
        heads_name = "subspaces (heads)" if white else "heads"
        return {
            "name": "crate_digits" if white else f"vit_{index}",
            "label": "CRATE" if white else "ViT" if index == 1 else f"ViT {index}",
            "parameters": 53_000 if white else 201_418,
            "seconds": 25.1 if white else 61.0,
            "facts": [["depth", str(depth)], ["width", "64"], [heads_name, str(heads)], ["patch", "2 × 2"]],
            "learnt": {"objective": "supervised", "labels": True, "settings": {}},
            "health": None,
            "curves": curves(rng, best, max(len(names), 1)),
            "scores": scores(rng, names or ["?"], best, per_class) | {"by": "classifier"},
            "features": None,
            "views": None,
            "audit": audited(
                rng, depth, steps, set(rising) if white else set(), "texts" if task else "images"
            ),
            "attention": attention(rng, depth, heads, images, grid, side, names),
            **(without_labels(rng, names, unlabelled, state, side) if unlabelled else {}),
            **(
                {
                    "attention": None,
                    "text": of_text(rng, depth, heads, task, index),
                    **({} if task == "whole" else {"scores": None}),
                }
                if task
                else {}
            ),
        }

    data = {
        "name": "digits",
        "train": 1347,
        "test": 450,
        "classes": names,
        "in_chans": 1,
        "img_size": [8, 8],
        "mean": [0.305],
        "std": [0.376],
        "rejects": [{"path": "photos/broken.jpg", "reason": "the file ends after 1,024 bytes"}],
    }
    if task:
        data = {
            "kind": "text",
            "name": "books",
            "train": 60,
            "test": 12,
            "train_words": 20000,
            "test_words": 5000,
            "train_bytes": 80000,
            "test_bytes": 20000,
            "classes": names if task == "whole" else [],
            "tokenizer": {"name": "bpe", "vocab_size": 1024, "bytes_per_word": 4.0, "fingerprint": "ab" * 32},
            "alone": {"nats": 5.0, "bits_per_byte": None if task == "masked" else 4.2},
            "rejects": data["rejects"],
        }
    config = {"epochs": 80, "lr": 0.005, "augment": ["rotate", "shift"], "strict": True, "resume": None}
    return {
        "title": "demo",
        "created": "2026-11-24",
        "version": "0.1.0",
        "command": "pellucid demo",
        "models": [model(index) for index in range(models)],
        "data": data,
        "config": config,
    }


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., dict]:
    """Builds a fresh bundle; see ``make`` for what can be chosen."""
    return make


def _story(number: int) -> str:
    """A text of a small grammar, another one for each number."""
    draw = random.Random(number)
    who, did = ("the sun", "a river", "my brother"), ("saw", "took")
    lines = [f"And {draw.choice(who)} {draw.choice(did)} the stone, für immer.\n" for _ in range(4)]
    return "".join(lines)


@pytest.fixture(scope="session")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on text, trained for a moment, and a GPT-2 beside it."""
    from pellucid.training import train

    root = tmp_path_factory.mktemp("text")
    (root / "stories").mkdir()
    for number in range(16):
        (root / "stories" / f"{number:02d}.txt").write_text(_story(number), encoding="utf-8")
    out = root / "runs" / "stories"
    small = {"context": 48, "depth": 2, "embed_dim": 16, "num_heads": 2}
    for model, folder in (("crate_gpt_bytes", out), ("gpt2_bytes", out / "beside-gpt2_bytes")):
        options = {"objective": "causal-lm", "model": model, "model_args": small, "batch_size": 16}
        train(str(root / "stories"), out=str(folder), epochs=1, progress=False, **options)
    return out


@contextmanager
def serving_in_a_thread(answers: Answers) -> Iterator[Guard]:
    import uvicorn

    opened = listening(0)
    guard = Guard(application(answers), opened.getsockname()[1])
    running = uvicorn.Server(uvicorn.Config(guard, log_level="error", lifespan="off", ws="none"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield guard
    running.should_exit = True
    thread.join(10)


@pytest.fixture(scope="session")
def serving() -> Callable[[Answers], AbstractContextManager[Guard]]:
    """``with serving(answers) as guard``: the page's server at ``guard.address``, in a thread."""
    return serving_in_a_thread
