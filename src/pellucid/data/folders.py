"""Folders of pictures: which files, which classes, which split. Nothing is decoded here.

A class is a folder; its pictures lie in it, at any depth. Where labels are optional, every picture counts,
wherever it lies, unless the folder is one that supervised training would take, with no picture outside of
its class folders. Hidden files and files without an image extension are ignored. Every real file counts once
in a tree, by device and inode, in sorted order. A link to a file is followed, and so is a link that is
itself a class folder, for the user has put it there; a link to a folder further down is not, since one that
stays in the tree repeats pictures or runs in circles, and one that leaves it may lead anywhere.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from pellucid.data.dataset import FileImages, Reject
from pellucid.data.found import UNLABELLED, Asked, Found, divide
from pellucid.data.images import EXTENSIONS, show_name
from pellucid.errors import DataError, PellucidError

TEST_NAMES = ("val", "valid", "validation", "test")  # the first that is there is the one used
_IGNORED = frozenset({"__MACOSX"})  # left behind by zip archives


class ImageFile(NamedTuple):
    path: str
    relative: str  # from the root that was asked for, "/" between the parts
    size: int  # bytes; 0 where stat fails


@dataclass
class Tree:
    """One folder of class folders. Class name -> its files in sorted order."""

    root: str
    classes: dict[str, list[ImageFile]] = field(default_factory=dict)
    loose: list[ImageFile] = field(default_factory=list)  # directly in the root, in no class
    unlisted: list[Reject] = field(default_factory=list)  # folders that could not be read
    links: list[str] = field(default_factory=list)  # links to folders, not followed

    def __len__(self) -> int:
        """Pictures that have a class."""
        return sum(map(len, self.classes.values()))

    @property
    def files(self) -> list[ImageFile]:
        """Every picture, with a class or without, sorted."""
        return sorted(self.classed + self.loose, key=lambda file: file.relative)

    @property
    def classed(self) -> list[ImageFile]:
        """The pictures that have a class, class by class."""
        return [file for files in self.classes.values() for file in files]


@dataclass(frozen=True)
class Layout:
    """What a folder offers: ``test`` is None when it has no split of its own."""

    root: str
    train: Tree
    test: Tree | None
    labelled: bool = True

    @property
    def class_names(self) -> list[str]:
        return sorted(self.train.classes) if self.labelled else []

    @property
    def trees(self) -> list[Tree]:
        return [self.train] if self.test is None else [self.train, self.test]

    @property
    def unlisted(self) -> tuple[Reject, ...]:
        return tuple(folder for tree in self.trees for folder in tree.unlisted)


def find_folder(root: str, name: str, asked: Asked) -> Found:
    """The pictures in a folder. Raises DataError when it cannot be listed at all."""
    layout = find_layout(root)
    unlabelled = replace(layout, labelled=False)
    problems, without = _problems(layout, asked.test_only), _problems(unlabelled, asked.test_only)
    notes = list(_notes(layout))
    if asked.labels == "optional" and (problems or any(tree.loose for tree in layout.trees)):
        why = [problem.split(" - ")[0] for problem in problems[:1]] or [
            "images lie outside the class folders"
        ]
        notes = [f"taken without labels: {why[0]}{_deeper(root)}", *_links(layout)]
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


def find_layout(root: str) -> Layout:
    """Read the folder tree. Raises DataError when ``root`` cannot be listed at all."""
    folders = {name.lower(): name for name in _class_folders(root)}
    test = next((folders[name] for name in TEST_NAMES if name in folders), None)
    if "train" not in folders or test is None:
        return Layout(root, _scan(root, prefix=""), None)
    train = folders["train"]
    pair = [_scan(os.path.join(root, name), prefix=f"{name}/") for name in (train, test)]
    return Layout(root, pair[0], pair[1])


def holds_pictures_below(root: str) -> bool:
    """Whether a picture lies in a visible folder of ``root``, at any depth."""
    for here, folders, names in os.walk(root):
        folders[:] = filter(_visible, folders)
        if here != root and any(map(_is_picture, names)):
            return True
    return False


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
    yield from _links(layout)


def _links(layout: Layout) -> Iterator[str]:
    for tree in layout.trees:
        for link in tree.links:
            yield f"{show_name(link)} is a link to a folder, not followed"


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
            f"{_deeper(layout.root) or remedy}"
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
        f"{_deeper(layout.root) or ' - add images to that folder or remove it'}"
        for tree in layout.trees
        for name, files in tree.classes.items()
        if not files
    ]


def _no_images(layout: Layout) -> str:
    shown = show_name(layout.train.root)
    if hint := _deeper(layout.root):
        return f"no images under {shown}{hint}"
    if layout.train.loose:
        return (
            f"no class folders under {shown}: its {len(layout.train.loose)} images lie side by side"
            f" - put each class in a folder of its own, or {UNLABELLED}"
        )
    return f"no images under {shown} - put each class in a folder of its own: {shown}/CLASS/picture.jpg"


def _deeper(root: str, depth: int = 2) -> str:
    """``" - did you mean 'X/foo'?"`` when the class folders begin further down, at a train/val pair."""
    for name in _class_folders(root, missing_ok=True):
        below = os.path.join(root, name)
        children = _class_folders(below, missing_ok=True)
        names = {child.lower() for child in children}
        is_pair = "train" in names and bool(names.intersection(TEST_NAMES))
        if is_pair or (name.lower() == "train" and children):
            return f" - did you mean {show_name(below)}?"
        if depth > 1 and (hint := _deeper(below, depth - 1)):
            return hint
    return ""


def _class_folders(root: str, missing_ok: bool = False) -> list[str]:
    """Sorted names of the visible folders in ``root``; a link back to it or above it is not one."""
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if _visible(entry.name) and entry.is_dir()]
    except OSError as error:
        if missing_ok:
            return []
        raise DataError(f"cannot list {show_name(root)}: {error.strerror} - check its permissions") from None
    return sorted(name for name in names if not _leads_back(root, name))


def _leads_back(root: str, name: str) -> bool:
    path = os.path.join(root, name)
    if not os.path.islink(path):
        return False
    target, here = os.path.realpath(path), os.path.realpath(root)
    return os.path.commonpath([target, here]) == target


def _visible(name: str) -> bool:
    return not name.startswith(".") and name not in _IGNORED


def _scan(root: str, prefix: str) -> Tree:
    tree = Tree(root)
    seen: set[tuple[int, int]] = set()
    for name in _class_folders(root):
        tree.classes[name] = _walk(os.path.join(root, name), f"{prefix}{name}", tree, seen)
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if _is_picture(entry.name) and not entry.is_dir()]
    tree.loose = list(_new_files(root, names, prefix, seen))
    return tree


def _walk(folder: str, relative: str, tree: Tree, seen: set[tuple[int, int]]) -> list[ImageFile]:
    """The pictures in ``folder`` and below, sorted; what ``seen`` holds is passed over and added to."""
    found: list[ImageFile] = []
    for here, folders, names in os.walk(folder, onerror=lambda error: tree.unlisted.append(_unlisted(error))):
        folders[:] = sorted(filter(_visible, folders))
        below = (os.path.join(here, name) for name in folders)
        tree.links.extend(filter(os.path.islink, below))
        inside = "" if here == folder else os.path.relpath(here, folder).replace(os.sep, "/") + "/"
        found += _new_files(here, filter(_is_picture, names), f"{relative}/{inside}", seen)
    return sorted(found, key=lambda file: file.relative)


def _new_files(
    folder: str, names: Iterable[str], prefix: str, seen: set[tuple[int, int]]
) -> Iterator[ImageFile]:
    """Those of these files that are not in ``seen``, sorted; adds them to it."""
    for name in sorted(names):
        path = os.path.join(folder, name)
        size, identity = _stat(path)
        if identity is None or identity not in seen:
            yield ImageFile(path, prefix + name, size)
        if identity is not None:
            seen.add(identity)


def _unlisted(error: OSError) -> Reject:
    return Reject(str(error.filename), f"cannot be listed: {(error.strerror or 'unknown').lower()}")


def _is_picture(name: str) -> bool:
    return _visible(name) and os.path.splitext(name)[1].lower() in EXTENSIONS


def _stat(path: str) -> tuple[int, tuple[int, int] | None]:
    """Size in bytes and (device, inode); (0, None) for a dangling link. The image door names the reason."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, None
    return (status.st_size if stat.S_ISREG(status.st_mode) else 0), (status.st_dev, status.st_ino)
