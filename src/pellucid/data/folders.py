"""Folders of pictures: which files, which classes, which split. Nothing is decoded here.

Where labels are optional, every picture counts, wherever it lies, unless the folder is one that supervised
training would take, with no picture outside of its class folders. ``trees`` says what lies in a folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from pellucid.data.dataset import FileImages
from pellucid.data.found import UNLABELLED, Asked, Found, divide
from pellucid.data.images import EXTENSIONS, show_name
from pellucid.data.trees import Layout, Tree, deeper, find_layout, links, visible
from pellucid.errors import DataError, PellucidError


def find_folder(root: str, name: str, asked: Asked) -> Found:
    """The pictures in a folder. Raises DataError when it cannot be listed at all."""
    layout = find_layout(root, is_picture)
    unlabelled = replace(layout, labelled=False)
    problems, without = _problems(layout, asked.test_only), _problems(unlabelled, asked.test_only)
    notes = list(_notes(layout))
    if asked.labels == "optional" and (problems or any(tree.loose for tree in layout.trees)):
        why = [problem.split(" - ")[0] for problem in problems[:1]] or [
            "images lie outside the class folders"
        ]
        notes = [f"taken without labels: {why[0]}{deeper(root)}", *links(layout)]
        layout, problems = unlabelled, without
    shown = unlabelled if _classes_with_images(layout) < 2 and not asked.test_only else layout
    train, test = (_images(shown, tree, asked) for tree in (shown.train, shown.test))
    found = Found(
        name=name,
        where=show_name(root),
        train=train,
        test=test,
        class_names=shown.class_names,
        fingerprint=_fingerprint(layout, asked.test_only),
        problems=[DataError(problem) for problem in problems],
        notes=notes,
        unread=layout.unlisted,
    )
    if not problems:
        try:
            own = None if layout.test is None else test
            found.train, found.test = divide(train, own, asked, found.where)
        except PellucidError as error:
            found.problems.append(error)
    elif not without:
        found.without_labels = sum(len(tree.files) for tree in layout.trees)
    return found


def _images(layout: Layout, tree: Tree | None, asked: Asked) -> FileImages:
    """The files of ``tree`` in class order, each with its class index; without labels, all in one order."""
    items: list[tuple[ImageFile, int]] = []
    if tree is not None and layout.labelled:
        names = layout.class_names
        items = [(file, label) for label, name in enumerate(names) for file in tree.classes.get(name, [])]
    elif tree is not None:
        items = [(file, -1) for file in tree.files]
    labels = torch.tensor([label for _, label in items], dtype=torch.int64)
    return FileImages([file.path for file, _ in items], labels, root=layout.root, max_pixels=asked.max_pixels)


def _fingerprint(layout: Layout, test_only: bool) -> str:
    digest = hashlib.sha256()
    for name in layout.class_names:
        digest.update(os.fsencode(name) + b"\0")
    trees = layout.trees[-1:] if test_only else layout.trees
    files = [file for tree in trees for file in (tree.classed if layout.labelled else tree.files)]
    for relative, size in sorted((os.fsencode(file.relative), file.size) for file in files):
        digest.update(b"%s\0%d\0" % (relative, size))
    return digest.hexdigest()


def _classes_with_images(layout: Layout) -> int:
    return sum(map(bool, layout.train.classes.values()))


def _notes(layout: Layout) -> Iterator[str]:
    for tree in layout.trees:
        if tree.loose:
            yield f"{len(tree.loose):,} images directly in {show_name(tree.root)} are in no class and ignored"
    yield from links(layout)


def _problems(layout: Layout, test_only: bool) -> list[str]:
    """Why this folder cannot be used, each with its remedy; empty when it can."""
    if not layout.labelled:
        return [
            f"no images under {show_name(tree.root)} - put some there"
            for tree in layout.trees
            if not tree.files
        ]
    if not len(layout.train):
        return [_no_images(layout)]
    found = _empty_classes(layout)
    if len(layout.train.classes) == 1 and not test_only:
        remedy = f" - give every class a folder of its own, at least two, or {UNLABELLED}"
        found.append(
            f'only one class, "{show_name(layout.class_names[0])}" - {show_name(layout.root)}'
            f"{deeper(layout.root) or remedy}"
        )
    if layout.test is not None:
        return found + _test_problems(layout.train, layout.test)
    return found if test_only else found + _cannot_be_split(layout.train)


def _cannot_be_split(tree: Tree) -> list[str]:
    return [
        f'class "{show_name(name)}" has 1 image and cannot be split into train and test'
        f" - {show_name(tree.root)} - add images or remove the folder"
        for name, files in tree.classes.items()
        if len(files) == 1
    ]


def _test_problems(train: Tree, test: Tree) -> list[str]:
    unknown = sorted(test.classes.keys() - train.classes.keys())
    found = []
    if unknown:
        names = ", ".join(f'"{show_name(name)}"' for name in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        found.append(
            f"classes without training images: {names}{more} - {show_name(test.root)}"
            f" - add them to {show_name(train.root)} or remove them"
        )
    if not len(test):
        found.append(f"no images under {show_name(test.root)} - put each class in a folder of its own there")
    return found


def _empty_classes(layout: Layout) -> list[str]:
    unlisted = dict(layout.unlisted)
    return [
        f'class "{show_name(name)}" {unlisted.get(os.path.join(tree.root, name), "has no images")}'
        f" - {show_name(tree.root)}"
        f"{deeper(layout.root) or ' - add images to that folder or remove it'}"
        for tree in layout.trees
        for name, files in tree.classes.items()
        if not files
    ]


def _no_images(layout: Layout) -> str:
    shown = show_name(layout.train.root)
    if hint := deeper(layout.root):
        return f"no images under {shown}{hint}"
    if layout.train.loose:
        return (
            f"no class folders under {shown}: its {len(layout.train.loose)} images lie side by side"
            f" - put each class in a folder of its own, or {UNLABELLED}"
        )
    return f"no images under {shown} - put each class in a folder of its own: {shown}/CLASS/picture.jpg"


def is_picture(name: str) -> bool:
    """Whether a file of this name is taken for a picture."""
    return visible(name) and os.path.splitext(name)[1].lower() in EXTENSIONS
