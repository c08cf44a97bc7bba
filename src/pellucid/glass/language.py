"""What a report shows of language models: how they tell words, what they write, what atoms respond to."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid import __version__
from pellucid.data import TextData, Tokenizer, Windows, eval_token_loader
from pellucid.errors import ConfigError
from pellucid.glass.bundle import curves, settings
from pellucid.glass.feed import text_windows
from pellucid.glass.passages import gazes, samples, spaced
from pellucid.glass.spelling import pieces, spelt
from pellucid.measure import TextScores, audit, evaluate, pushed_words, read_atoms, score_text
from pellucid.measure.atoms import NO_WORD
from pellucid.measure.language import difference, nats_alone
from pellucid.models import Sampling, generate
from pellucid.models.language import KINDS, LanguageModel, ToSTLM
from pellucid.steps import ISTA, MLP, OvercompleteISTA
from pellucid.training import Run

WORDS_AT_ONCE = 16_384
"""Words of a batch that is measured on."""

AUDITED_WORDS = 16_384
"""A causal step's objective takes a determinant for each word, so not all words are audited."""

ATOM_WORDS = 65_536
"""Words that atoms are shown."""

CLEAREST, MIDDLE, CONTEXTS = 8, 4, 5
"""Atoms of a layer that are shown, the clearest and some from the middle of them, and contexts of each."""

WRITTEN_WORDS = 240
"""Words that a model writes at most to show how it writes."""

SAMPLING = Sampling(temperature=0.8, top_p=0.95)

LABELS = {
    "crate_gpt": "CRATE",
    "crate_overcomplete_gpt": "CRATE, overcomplete",
    "crate_alpha_gpt": "CRATE-alpha",
    "crate_aot_gpt": "CRATE of attention alone",
    "tost_gpt": "ToST",
    "gpt2": "GPT-2",
    "crate_bert": "masked CRATE",
    "crate_alpha_bert": "masked CRATE-alpha",
    "bert": "BERT",
}
"""What the kinds of language models are called in print."""

Progress = Callable[[str], None]


def collect_text(
    runs: Sequence[Run], texts: TextData, *, command: str = "", progress: Progress = lambda line: None
) -> dict[str, Any]:
    """Everything that a report on text shows, measured now.

    Args:
        runs: the subject first, then those that stand beside it; all trained on ``texts``.
        texts: whose held-out documents to measure on, with the tokenizer of the runs.
        command: the line that made the subject.
        progress: gets a line before each measurement.

    Returns:
        A JSON-able dict; see ``docs/bundle.md`` for its fields.

    Raises:
        ConfigError: a run on images, or one with another tokenizer or other classes than ``texts`` have.
    """
    models: list[dict[str, Any]] = []
    scored: list[TextScores | None] = []
    for run, windows in [(run, windows_of(run, texts)) for run in runs]:
        progress(f"scoring {run.config.model}")
        scored.append(None if run.model.classifier is not None else score_held_out(run.model, windows))
        models.append(_model(run, windows, texts, scored[-1], progress))
        models[-1]["text"]["against"] = _against(scored[-1], scored[0]) if len(scored) > 1 else None
    return {
        "title": runs[0].out.name,
        "created": datetime.date.today().isoformat(),
        "version": __version__,
        "command": command,
        "models": models,
        "data": _data(texts, ends=runs[0].model.causal),
        "config": settings(runs[0]),
    }


def windows_of(run: Run, texts: TextData) -> Windows:
    """Held-out documents, cut as the run was told to cut them.

    Raises:
        ConfigError: see :func:`collect_text`.
    """
    options = run.config
    windows = text_windows(
        run.model,
        texts,
        cross_documents=options.cross_documents,
        mask_share=options.objective_args.get("mask_share", 0.15),
        seed=options.seed,
    )
    classifier, classes = run.model.classifier, texts.class_names
    if classifier is not None and classifier.out_features != len(classes):
        raise ConfigError(
            f"{run.out} learnt {classifier.out_features} classes, {texts.name} has {len(classes)} - give "
            f"runs on the same data"
        )
    return windows


def score_held_out(
    model: LanguageModel, windows: Windows, progress: Callable[[int], None] | None = None
) -> TextScores:
    """How well the model tells the words of all windows, with intervals over their documents.

    Raises:
        ConfigError: a model that classifies.
        NumericsError: scores that are not finite.
    """
    return score_text(
        model,
        _batches(windows),
        text_bytes=windows.text_bytes or None,
        word_bytes=_word_bytes(windows.tokenizer, model.vocab_size),
        documents=torch.from_numpy(windows.document),
        progress=progress,
    )


def audit_text(model: LanguageModel, windows: Windows, name: str, rows: int | None = None) -> dict[str, Any]:
    """The audit on rows of text, evenly spaced, as a dict; on ``rows`` of them where it says so."""
    limit = max(4, AUDITED_WORDS // model.context) if rows is None else rows
    return audit(model, eval_token_loader(windows, batch_size=8, limit=limit), data=name).to_dict()


def text_label(model: LanguageModel) -> str:
    """What the family is called in print."""
    name = getattr(model, "architecture", "")
    kind = max((kind for kind in KINDS if name.startswith(f"{kind}_")), key=len, default="")
    return LABELS.get(kind, "ToST" if isinstance(model, ToSTLM) else "CRATE")


def text_facts(model: LanguageModel) -> list[list[str]]:
    """The architecture in words and numbers."""
    steps: dict[str, Any] = dict(model.layers[0].items())  # type: ignore[operator]
    compress, sparsify = steps["compress"], steps.get("sparsify")
    heads = str(compress.num_heads)
    if hasattr(compress, "head_dim"):
        heads += f", subspaces of dimension {compress.head_dim}"
    found = [
        ["reads", "each word with those before it" if model.causal else "all words at once"],
        ["context", f"{model.context} words"],
        ["vocabulary", f"{model.vocab_size} words"],
        ["depth", str(len(model.layers))],
        ["width", str(model.embed_dim)],
        ["heads", heads],
        ["compression", type(compress).__name__],
    ]
    if isinstance(sparsify, ISTA | OvercompleteISTA):
        found += [
            ["atoms", str(sparsify.dictionary.shape[1])],
            ["ISTA step size, sparsity", f"{sparsify.step_size:g}, {sparsify.sparsity:g}"],
        ]
    elif isinstance(sparsify, MLP):
        found.append(["hidden units", str(sparsify.fc1.out_features)])
    tables = (model.embed.words, model.embed.places)
    return [*found, ["parameters in word tables", f"{sum(table.weight.numel() for table in tables):,}"]]


def _model(
    run: Run, windows: Windows, texts: TextData, scores: TextScores | None, progress: Progress
) -> dict[str, Any]:
    model, name, config = run.model, run.config.model, run.config
    classes = None
    if model.classifier is not None:
        found = evaluate(model, _batches(windows), texts.class_names)
        classes = {**found.to_dict(), "by": "classifier"}
    progress(f"auditing {name}")
    audited = audit_text(model, windows, texts.name)
    progress(f"reading what the layers of {name} respond to")
    alone = nats_alone(_counts(texts, "train", ends=model.causal))
    return {
        "name": name,
        "label": text_label(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": run.seconds,
        "facts": text_facts(model),
        "learnt": {
            "objective": config.objective,
            "labels": None if classes is None else True,
            "settings": dict(config.objective_args),
        },
        "curves": curves(run) if scores is None or not model.causal else _in_bits(curves(run), texts),
        "scores": classes,
        "audit": audited,
        "text": {
            "task": windows.task,
            "unit": "byte" if texts.tokenizer.name == "bytes" else "word",
            "scores": None if scores is None else scores.to_dict(),
            "against": None,
            "samples": samples(model, windows, texts.class_names),
            "attention": gazes(model, windows, alone),
            "atoms": _atoms(model, windows),
            "written": _written(model, texts),
        },
    }


def _against(scores: TextScores | None, subject: TextScores | None) -> dict[str, Any] | None:
    """How much more the model beside needs than the subject; None where they do not tell the same words."""
    if scores is None or subject is None:
        return None
    try:
        more, interval = difference(scores, subject)
    except ConfigError:
        return None
    known = scores.bits_per_byte is not None
    return {"more": more, "interval": interval, "unit": "bits per byte" if known else "nats per word"}


def _batches(windows: Windows, limit: int | None = None) -> Any:
    return eval_token_loader(windows, max(1, WORDS_AT_ONCE // windows.context), limit=limit)


def _word_bytes(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Bytes of text that each word stands for; none of the special ones, nor of numbers that are no words."""
    sizes = torch.zeros(vocab_size)
    for word in range(tokenizer.vocab_size):
        if word not in tokenizer.special:
            sizes[word] = len(tokenizer.decode([word]))
    return sizes


def _counts(texts: TextData, split: str, *, ends: bool) -> Tensor:
    """How often each word stands in the documents, with the one that ends them or without."""
    part = getattr(texts, split)
    counts = torch.from_numpy(np.bincount(part.ids, minlength=texts.tokenizer.vocab_size))
    if ends:
        counts[texts.tokenizer.end] += len(part)
    return counts


def _in_bits(columns: dict[str, Any], texts: TextData) -> dict[str, Any]:
    """The same with training losses in bits for each byte, as the measures of held-out text are."""
    size = int(texts.train.sizes.sum())
    words = len(texts.train.ids) + len(texts.train)
    train = columns["train"]
    if size and "bits per byte" not in train:
        scale = words / size / math.log(2)
        train["bits per byte"] = [None if loss is None else loss * scale for loss in train["loss"]]
    return columns


def _atoms(model: LanguageModel, windows: Windows) -> list[dict[str, Any]]:
    """Of every layer what its atoms respond to: in numbers, and some of them with their contexts."""
    if len(windows) < 2:
        return []
    try:
        found = read_atoms(model, _batches(windows, limit=max(2, ATOM_WORDS // windows.context)))
    except ConfigError:  # attention alone
        return []
    layers = []
    for each in found:
        ranked = each.ranked()
        half = max(CLEAREST, len(ranked) // 2 - MIDDLE // 2)
        shown = {"clearest": ranked[:CLEAREST], "middle": ranked[half : half + MIDDLE]}
        chosen = [atom for atoms in shown.values() for atom in atoms]
        pushes: dict[int, Any] = {}
        if model.causal and model.classifier is None:
            pushes = dict(zip(chosen, pushed_words(model, each.layer, each.step, chosen), strict=True))
        described = {
            name: [_atom(each.describe(atom), pushes.get(atom), windows.tokenizer) for atom in atoms]
            for name, atoms in shown.items()
        }
        layers.append(each.summary() | described)
    return layers


def _atom(told: dict[str, Any], pushes: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """One atom with its words spelt."""
    contexts = []
    for context in told["contexts"][:CONTEXTS]:
        words, at = context["words"], context["at"]
        parts = {"before": words[:at], "word": words[at : at + 1], "after": words[at + 1 :]}
        spoken = {name: spelt(tokenizer, [w for w in part if w != NO_WORD]) for name, part in parts.items()}
        contexts.append({**spoken, "value": context["value"]})
    named = None if told["word"] is None else spelt(tokenizer, [told["word"]])
    pushed = None
    if pushes is not None:
        pushed = {side: [[spelt(tokenizer, [w]), score] for w, score in pushes[side]] for side in pushes}
    return {**told, "word": named, "contexts": contexts, "pushes": pushed}


def _written(model: LanguageModel, texts: TextData) -> dict[str, Any] | None:
    """What the model writes: from nothing, and behind the beginnings of two held-out documents."""
    if not model.causal or model.classifier is not None:
        return None
    words = texts.tokenizer
    begin = max(1, min(32, model.context // 4))
    starts = [texts.test.document(i)[:begin].tolist() for i in spaced(2, len(texts.test))]
    prompts = [[words.end], *([words.end, *start] for start in starts if start)]
    count = min(WRITTEN_WORDS, model.context - max(map(len, prompts)) + 1)
    if count < 1:
        return None
    options = asdict(SAMPLING)
    rows = generate(model, prompts, count, stop=words.end, **options)
    new = [row[len(prompt) :].tolist() for prompt, row in zip(prompts, rows, strict=True)]
    return {
        "settings": {key: value for key, value in options.items() if value not in (None, 1.0)},
        "texts": [
            {
                "prompt": spelt(words, prompt[1:]),
                "text": "".join(piece.text for piece in pieces(words, own) if not piece.special),
                "ended": words.end in own,
            }
            for prompt, own in zip(prompts, new, strict=True)
        ],
    }


def _data(texts: TextData, *, ends: bool) -> dict[str, Any]:
    counts = _counts(texts, "test", ends=ends).double()
    nats = float((counts * nats_alone(_counts(texts, "train", ends=ends))).sum())
    size, words = int(texts.test.sizes.sum()), len(texts.test.ids)
    return {
        "kind": "text",
        "name": texts.name,
        "train": len(texts.train),
        "test": len(texts.test),
        "train_words": len(texts.train.ids),
        "test_words": words,
        "train_bytes": int(texts.train.sizes.sum()),
        "test_bytes": size,
        "classes": texts.class_names,
        "tokenizer": {
            "name": texts.tokenizer.name,
            "vocab_size": texts.tokenizer.vocab_size,
            "bytes_per_word": size / words if words else None,
            "fingerprint": texts.tokenizer.fingerprint,
        },
        "alone": {
            "nats": nats / float(counts.sum()) if words else None,
            "bits_per_byte": nats / math.log(2) / size if size and ends else None,
        },
        "rejects": [reject._asdict() for reject in texts.rejects],
    }
