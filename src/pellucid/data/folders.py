"""Folders of pictures: which files, which classes, which split. Nothing is decoded here.

A class is a folder; its pictures lie in it, at any depth. Hidden files and files without an image
extension are ignored. Every real file counts once in a tree, by device and inode, in sorted order. A link
to a file is followed, and so is a link that is itself a class folder, for the user has put it there; a
link to a folder further down is not, since one that stays in the tree repeats pictures or runs in circles,
and one that leaves it may lead anywhere.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from typing import NamedTuple

from pellucid.data.dataset import Reject
from pellucid.data.images import EXTENSIONS, show_name
from pellucid.data.split import hold_out, refuse_fraction
from pellucid.errors import DataError

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
    loose: int = 0  # pictures directly in the root, in no class
    unlisted: list[Reject] = field(default_factory=list)  # folders that could not be read
    links: list[str] = field(default_factory=list)  # links to folders, not followed

    def __len__(self) -> int:
        return sum(map(len, self.classes.values()))


@dataclass(frozen=True)
class Layout:
    """What a folder offers: ``test`` is None when it has no split of its own."""

    root: str
    train: Tree
    test: Tree | None

    @property
    def class_names(self) -> list[str]:
        return sorted(self.train.classes)

    @property
    def trees(self) -> list[Tree]:
        return [self.train] if self.test is None else [self.train, self.test]

    @property
    def unlisted(self) -> tuple[Reject, ...]:
        return tuple(folder for tree in self.trees for folder in tree.unlisted)


class Split(NamedTuple):
    """Files and their class indices, train and test."""

    train: list[tuple[ImageFile, int]]
    test: list[tuple[ImageFile, int]]


def find_layout(root: str) -> Layout:
    """Read the folder tree. Raises DataError when ``root`` cannot be listed at all."""
    folders = {name.lower(): name for name in _class_folders(root)}
    test = next((folders[name] for name in TEST_NAMES if name in folders), None)
    if "train" not in folders or test is None:
        return Layout(root, _scan(root, prefix=""), None)
    train = folders["train"]
    trees = [_scan(os.path.join(root, name), prefix=f"{name}/") for name in (train, test)]
    return Layout(root, *trees)


def problems(layout: Layout, *, test_only: bool = False) -> list[str]:
    """Why this folder cannot be used, each with its remedy; empty when it can."""
    if not len(layout.train):
        return [_no_images(layout)]
    found = _empty_classes(layout)
    if len(layout.train.classes) == 1 and not test_only:
        found.append(
            f'only one class, "{show_name(layout.class_names[0])}" - {show_name(layout.root)}'
            f"{_deeper(layout.root) or ' - give every class a folder of its own, at least two'}"
        )
    if layout.test is not None:
        return found + _test_problems(layout.train, layout.test)
    return found if test_only else found + _cannot_be_split(layout.train)


def split(layout: Layout, *, test_fraction: float | None, seed: int, test_only: bool = False) -> Split:
    """The folder's own split, or else a stratified hold-out.

    With ``test_only`` the whole of the test pictures, or of a folder without a split, is both.
    """
    if layout.test is not None:
        refuse_fraction(test_fraction, show_name(layout.root))
    if test_only:
        whole = labelled(layout, layout.train if layout.test is None else layout.test)
        return Split(whole, whole)
    train = labelled(layout, layout.train)
    if layout.test is not None:
        return Split(train, labelled(layout, layout.test))
    kept, held_out = hold_out([label for _, label in train], test_fraction, seed)
    return Split([train[i] for i in kept], [train[i] for i in held_out])


def labelled(layout: Layout, tree: Tree) -> list[tuple[ImageFile, int]]:
    """The files of ``tree`` in class order, each with its class index."""
    names = layout.class_names
    return [(file, label) for label, name in enumerate(names) for file in tree.classes.get(name, [])]


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
            f"no class folders under {shown}: its {layout.train.loose} images lie side by side"
            " - put each class in a folder of its own"
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
        tree.loose = sum(_is_picture(entry.name) and not entry.is_dir() for entry in entries)
    return tree


def _walk(folder: str, relative: str, tree: Tree, seen: set[tuple[int, int]]) -> list[ImageFile]:
    """The pictures in ``folder`` and below, sorted; what ``seen`` holds is passed over and added to."""
    found = []
    for here, folders, names in os.walk(folder, onerror=lambda error: tree.unlisted.append(_unlisted(error))):
        folders[:] = sorted(filter(_visible, folders))
        below = (os.path.join(here, name) for name in folders)
        tree.links.extend(filter(os.path.islink, below))
        for name in sorted(filter(_is_picture, names)):
            path = os.path.join(here, name)
            size, identity = _stat(path)
            if identity is None or identity not in seen:
                inside = os.path.relpath(path, folder).replace(os.sep, "/")
                found.append(ImageFile(path, f"{relative}/{inside}", size))
            if identity is not None:
                seen.add(identity)
    return sorted(found, key=lambda file: file.relative)


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
