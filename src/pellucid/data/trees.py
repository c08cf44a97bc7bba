"""What lies in a folder: files of one kind, by class folders, with or without a split. None is opened here.

A class is a folder; its files lie in it, at any depth. Hidden files and those of other kinds are ignored.
Every real file counts once in a tree, by device and inode, in sorted order. A link to a file is followed, and
so is a link that is itself a class folder, for the user has put it there; a link to a folder further down is
not, since one that stays in the tree repeats files or runs in circles, and one that leaves it may lead
anywhere.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pellucid.data.dataset import Reject
from pellucid.data.images import show_name
from pellucid.errors import DataError

TEST_NAMES = ("val", "valid", "validation", "test")  # the first that is there is the one used
_IGNORED = frozenset({"__MACOSX"})  # left behind by zip archives

Wanted = Callable[[str], bool]
"""Whether a file of this name counts."""


class FoundFile(NamedTuple):
    path: str
    relative: str  # from the root that was asked for, "/" between the parts
    size: int  # bytes; 0 where stat fails


@dataclass
class Tree:
    """One folder of class folders. Class name -> its files in sorted order."""

    root: str
    classes: dict[str, list[FoundFile]] = field(default_factory=dict)
    loose: list[FoundFile] = field(default_factory=list)  # directly in the root, in no class
    unlisted: list[Reject] = field(default_factory=list)  # folders that could not be read
    links: list[str] = field(default_factory=list)  # links to folders, not followed

    def __len__(self) -> int:
        """Files that have a class."""
        return sum(map(len, self.classes.values()))

    @property
    def files(self) -> list[FoundFile]:
        """Every file, with a class or without, sorted."""
        return sorted(self.classed + self.loose, key=lambda file: file.relative)

    @property
    def classed(self) -> list[FoundFile]:
        """The files that have a class, class by class."""
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


def find_layout(root: str, wanted: Wanted) -> Layout:
    """Read the folder tree. Raises DataError when ``root`` cannot be listed at all."""
    folders = {name.lower(): name for name in _class_folders(root)}
    test = next((folders[name] for name in TEST_NAMES if name in folders), None)
    if "train" not in folders or test is None:
        return Layout(root, _scan(root, wanted, prefix=""), None)
    train = folders["train"]
    pair = [_scan(os.path.join(root, name), wanted, prefix=f"{name}/") for name in (train, test)]
    return Layout(root, pair[0], pair[1])


def holds(root: str, wanted: Wanted, *, below: bool = False) -> bool:
    """Whether a file of this kind lies in ``root``, at any depth; with ``below``, in a folder in it."""
    for here, folders, names in os.walk(root):
        folders[:] = filter(visible, folders)
        if not (below and here == root) and any(map(wanted, names)):
            return True
    return False


def split_word(path: str) -> str:
    """``train``, one of TEST_NAMES or "", from a word of the file's name, or else its folder's."""
    folder, name = os.path.split(os.path.abspath(path))
    for text in (name, os.path.basename(folder)):
        words = re.split(r"[^a-z]+", text.lower())
        for word in ("train", *TEST_NAMES):
            if word in words:
                return word
    return ""


def links(layout: Layout) -> Iterator[str]:
    """A note for each link that was not followed."""
    for tree in layout.trees:
        for link in tree.links:
            yield f"{show_name(link)} is a link to a folder, not followed"


def deeper(root: str, depth: int = 2) -> str:
    """``" - did you mean 'X/foo'?"`` when the class folders begin further down, at a train/val pair."""
    for name in _class_folders(root, missing_ok=True):
        below = os.path.join(root, name)
        children = _class_folders(below, missing_ok=True)
        names = {child.lower() for child in children}
        is_pair = "train" in names and bool(names.intersection(TEST_NAMES))
        if is_pair or (name.lower() == "train" and children):
            return f" - did you mean {show_name(below)}?"
        if depth > 1 and (hint := deeper(below, depth - 1)):
            return hint
    return ""


def _class_folders(root: str, missing_ok: bool = False) -> list[str]:
    """Sorted names of the visible folders in ``root``; a link back to it or above it is not one."""
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if visible(entry.name) and entry.is_dir()]
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


def visible(name: str) -> bool:
    """Whether a file or folder of this name is looked at."""
    return not name.startswith(".") and name not in _IGNORED


def _scan(root: str, wanted: Wanted, prefix: str) -> Tree:
    tree = Tree(root)
    seen: set[tuple[int, int]] = set()
    for name in _class_folders(root):
        tree.classes[name] = _walk(os.path.join(root, name), f"{prefix}{name}", wanted, tree, seen)
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if wanted(entry.name) and not entry.is_dir()]
    tree.loose = list(_new_files(root, names, prefix, seen))
    return tree


def _walk(
    folder: str, relative: str, wanted: Wanted, tree: Tree, seen: set[tuple[int, int]]
) -> list[FoundFile]:
    """The files in ``folder`` and below, sorted; what ``seen`` holds is passed over and added to."""
    found: list[FoundFile] = []
    for here, folders, names in os.walk(folder, onerror=lambda error: tree.unlisted.append(_unlisted(error))):
        folders[:] = sorted(filter(visible, folders))
        below = (os.path.join(here, name) for name in folders)
        tree.links.extend(filter(os.path.islink, below))
        inside = "" if here == folder else os.path.relpath(here, folder).replace(os.sep, "/") + "/"
        found += _new_files(here, filter(wanted, names), f"{relative}/{inside}", seen)
    return sorted(found, key=lambda file: file.relative)


def _new_files(
    folder: str, names: Iterable[str], prefix: str, seen: set[tuple[int, int]]
) -> Iterator[FoundFile]:
    """Those of these files that are not in ``seen``, sorted; adds them to it."""
    for name in sorted(names):
        path = os.path.join(folder, name)
        size, identity = _stat(path)
        if identity is None or identity not in seen:
            yield FoundFile(path, prefix + name, size)
        if identity is not None:
            seen.add(identity)


def _unlisted(error: OSError) -> Reject:
    return Reject(str(error.filename), f"cannot be listed: {(error.strerror or 'unknown').lower()}")


def _stat(path: str) -> tuple[int, tuple[int, int] | None]:
    """Size in bytes and (device, inode); (0, None) for a dangling link. Its door names the reason."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, None
    return (status.st_size if stat.S_ISREG(status.st_mode) else 0), (status.st_dev, status.st_ino)
