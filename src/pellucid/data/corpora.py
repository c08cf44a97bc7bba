"""From a name to the sources of its texts: which to train on, which to test on. None is read here."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pellucid.data.dataset import Reject
from pellucid.data.found import Asked
from pellucid.data.images import show_name
from pellucid.data.sources import JsonLines, PartsOfFile, Rows, Source, WholeFile
from pellucid.data.tables import PREFIX, Tables, is_plain, label_column, open_tables, type_of
from pellucid.data.trees import (
    TEST_NAMES,
    FoundFile,
    Layout,
    Tree,
    deeper,
    find_layout,
    holds,
    links,
    split_word,
    visible,
)
from pellucid.errors import DataError, PellucidError, suggest

PROSE = frozenset({".txt", ".text", ".md", ".markdown", ".rst", ".org", ".adoc", ".tex", ".htm", ".html"})
CODE = frozenset(
    {".py", ".c", ".h", ".cc", ".hh", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt", ".scala", ".swift"}
    | {".js", ".jsx", ".ts", ".tsx", ".css", ".cs", ".m", ".f90", ".jl", ".r", ".rb", ".pl", ".php", ".lua"}
    | {".sh", ".sql", ".hs", ".ml", ".ex", ".erl", ".clj", ".el", ".lisp", ".scm", ".v", ".lean"}
)
LINES = frozenset({".jsonl", ".ndjson"})
COLUMNS = ("text", "label")


@dataclass
class Corpus:
    """What a folder, a file or a table offers.

    ``test`` is None where there is no split. ``class_names``: what the labels are indices into; None where
    they are names or numbers themselves. ``notes``: what is passed over. ``unread``: folders that could not
    be listed. ``one``: what to do about one text alone.
    """

    name: str
    where: str
    train: list[Source]
    test: list[Source] | None = None
    class_names: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    unread: tuple[Reject, ...] = ()
    one: str = "add texts"


def find_corpus(path: str, asked: Asked) -> Corpus:
    """The texts that ``path`` names. Raises DataError when it names none."""
    if path.startswith(PREFIX):
        return _of_tables(open_tables(path, COLUMNS, extra="lm"), asked)
    name, shown = show_name(os.path.basename(os.path.abspath(path))), show_name(path)
    if os.path.isdir(path):
        return _of_folder(path, name, asked)
    if os.path.lexists(path):
        title, lines = os.path.basename(path), _is_lines(path)
        source = JsonLines(path, title) if lines else PartsOfFile(path, title)
        one = "add lines" if lines else "it is too short to be cut: give more text, or a folder of texts"
        return Corpus(name, shown, [source], one=one)
    raise DataError(f"no folder and no file is called '{shown}' - check the path")


def is_text(name: str) -> bool:
    """Whether a file of this name is taken for a text: by its extension, or since it has none."""
    extension = os.path.splitext(name)[1].lower()
    return visible(name) and (extension in PROSE or extension in CODE or extension in ("", "."))


def holds_text(path: str) -> bool:
    """Whether a folder holds texts, or lines of JSON, at any depth; or whether a file is one by its name."""
    named = lambda name: _is_lines(name) or (is_text(name) and os.path.splitext(name)[1] != "")
    if not os.path.isdir(path):
        return os.path.lexists(path) and named(os.path.basename(path))
    return holds(path, named)


def _is_lines(name: str) -> bool:
    return visible(os.path.basename(name)) and os.path.splitext(name)[1].lower() in LINES


# --- folders ------------------------------------------------------------------------------------------


def _of_folder(root: str, name: str, asked: Asked) -> Corpus:
    layout = find_layout(root, _is_lines)
    others = find_layout(root, is_text)
    if any(tree.files for tree in layout.trees):
        corpus = _of_lines(layout, name)
        if beside := sum(len(tree.files) for tree in others.trees):
            corpus.notes.append(f"{beside:,} texts beside the .jsonl are ignored")
        return corpus
    layout = others
    corpus = Corpus(name, show_name(root), [], unread=layout.unlisted, notes=list(links(layout)))
    corpus.one = "add texts, or name the file itself, which is cut into parts"
    if layout.test is None and not len(layout.train):
        corpus.train, corpus.test = _by_name(layout.train.files, WholeFile, corpus)
    else:
        sides = [_texts(tree, asked, corpus.notes) for tree in layout.trees]
        corpus.train, corpus.test = sides[0], (sides[1] if len(sides) > 1 else None)
    for tree, sources in zip(layout.trees, (corpus.train, corpus.test), strict=False):
        if not sources:
            raise DataError(_none_in(tree))
    return corpus


def _texts(tree: Tree, asked: Asked, notes: list[str]) -> list[Source]:
    """The files of a tree, each with the class whose folder it is in."""
    found: list[tuple[FoundFile, str | None]] = []
    found += [(file, label) for label, files in tree.classes.items() for file in files]
    empty = [name for name, files in tree.classes.items() if not files]
    if empty and asked.labels == "required":
        shown = ", ".join(map(show_name, empty[:5])) + ", ..." * (len(empty) > 5)
        notes.append(f"folders without text in {show_name(tree.root)} are no classes: {shown}")
    if tree.loose and asked.labels == "required" and found:
        where = show_name(tree.root)
        notes.append(f"{len(tree.loose):,} texts directly in {where} are in no class and ignored")
    else:
        found += [(file, None) for file in tree.loose]
    found.sort(key=lambda item: item[0].relative)
    return [WholeFile(file.path, file.relative, label) for file, label in found]


def _of_lines(layout: Layout, name: str) -> Corpus:
    corpus = Corpus(name, show_name(layout.root), [], unread=layout.unlisted, notes=list(links(layout)))
    corpus.one = "add lines"
    if layout.test is None:
        corpus.train, corpus.test = _by_name(layout.train.files, JsonLines, corpus)
        return corpus
    for tree in layout.trees:
        if not tree.files:
            raise DataError(_none_in(tree))
    train, test = ([JsonLines(file.path, file.relative) for file in tree.files] for tree in layout.trees)
    corpus.train, corpus.test = list(train), list(test)
    return corpus


def _by_name(
    files: list[FoundFile], kind: type[WholeFile] | type[JsonLines], corpus: Corpus
) -> tuple[list[Source], list[Source] | None]:
    """Train and test where words of the files' names say so, as in ``train.txt`` and ``valid.txt``."""
    words = [split_word(file.path) for file in files]
    of_test = next((word for word in TEST_NAMES if word in words), None)
    sources: list[Source] = [kind(file.path, file.relative) for file in files]
    if "train" not in words or of_test is None:
        return sources, None
    if others := sum(word not in ("train", of_test) for word in words):
        corpus.notes.append(f"{others:,} files that are neither train nor {of_test} are ignored")
    train, test = (
        [source for source, word in zip(sources, words, strict=True) if word == wanted]
        for wanted in ("train", of_test)
    )
    return train, test


def _none_in(tree: Tree) -> str:
    """The message for a folder without texts."""
    shown = show_name(tree.root)
    if hint := deeper(tree.root):
        return f"no text found under {shown}{hint}"
    kinds = Counter(_extensions(tree.root)).most_common(5)
    there = ", ".join(f"{count:,} {show_name(kind)}" for kind, count in kinds)
    holds = f" (it holds {there})" if there else ""
    return f"no text found under {shown}{holds} - put .txt files there, or .jsonl"


def _extensions(root: str) -> Iterator[str]:
    for _, folders, names in os.walk(root):
        folders[:] = filter(visible, folders)
        for name in filter(visible, names):
            yield os.path.splitext(name)[1].lower()


# --- tables -------------------------------------------------------------------------------------------


def _of_tables(opened: Tables, asked: Asked) -> Corpus:
    text = _text_column(opened.train, opened.options.get("text"), opened.where)
    try:
        label = label_column(opened.train, opened.options.get("label"), opened.where)
    except PellucidError:
        if asked.labels == "required" or "label" in opened.options:
            raise
        label = None
    opened.refuse_missing([column for column in (text, label) if column is not None])
    names = None
    if label is not None and type_of(feature := opened.train.features[label]) == "ClassLabel":
        names = list(feature.names)
    unknown = None if names is None else -1
    sides: list[list[Source]] = [
        [Rows(table, text, label, f"{opened.where}/{name}", unknown)] for name, table in opened.tables.items()
    ]
    test = sides[1] if len(sides) > 1 else None
    return Corpus(opened.name, opened.where, sides[0], test, names, one="add rows")


def _text_column(table: Any, wanted: str | None, where: str) -> str:
    features = table.features
    texts = [name for name, feature in features.items() if _is_string(feature)]
    if wanted is not None:
        if wanted not in texts:
            raise DataError(f"{where} has no column of text '{show_name(wanted)}'{suggest(wanted, texts)}")
        return wanted
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        has = f"the columns of text {', '.join(texts)}" if texts else "no column of text"
        remedy = f"choose one: {PREFIX}{where}?text={texts[0]}" if texts else f"it has {', '.join(features)}"
        raise DataError(f"{where} has {has} - {remedy}")
    return texts[0]


def _is_string(feature: Any) -> bool:
    return is_plain(feature) and "string" in str(feature.dtype)
