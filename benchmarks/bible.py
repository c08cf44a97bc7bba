"""What language models of a million parameters make of the King James Bible, as bytes.

    python benchmarks/bible.py OUT [--text FILE] [--seeds 0 1 2] [--bytes 2e6]
    python benchmarks/bible.py OUT --classify [--passages 1000]

The text is what ``bible -f gen1:1-rev22:21`` prints (Debian's bible-kjv), one verse a line, or FILE, which
holds the same. ``OUT/chapters/train`` and ``OUT/chapters/val`` get a file for each chapter, without the names
of the verses; one chapter in ten is held back.

The first trains causal CRATE, CRATE-alpha and ToST and a GPT-2, all for as many bytes, and prints bits per
byte of the chapters held back. Time and memory of a training step are measured in turns, each in a process of
its own, after the runs.

The second trains masked models in the same way and then lets them tell the Old Testament from the New by
passages of up to 256 bytes: beginning at what they have learnt, and from scratch. Passages for testing are
from the chapters that were held back before, too.

Runs that have ended are taken as they are: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import numpy as np

from pellucid.training import Run, open_run, train

CONTEXT = 256
SPLITS = ("train", "val")

CAUSAL = ("crate_alpha_gpt_bytes", "crate_gpt_bytes", "tost_gpt_bytes", "gpt2_bytes")
MASKED = ("crate_alpha_bert_bytes", "crate_bert_bytes", "bert_bytes")
BASELINES = ("gpt2_bytes", "bert_bytes")

RECIPE: dict[str, Any] = {"batch_size": 8, "lr": 3e-3, "matrix_lr": 1e-2}
"""Of every model. The baselines saw fewer other rates and sizes than CRATE-alpha when it was chosen."""

FINE_TUNING: dict[str, Any] = {"batch_size": 16, "lr": 1e-3, "matrix_lr": 3e-3}
"""From weights that have learnt; what begins from scratch goes by RECIPE."""

NEW_TESTAMENT = "Mat"
"""The first book of it."""

VERSE = re.compile(r"(?P<book>\d?[A-Za-z]+)(?P<chapter>\d+):\d+ (?P<text>.+)")


class Chapter(NamedTuple):
    """One chapter: its file's name begins with its place, so that books stand in their order."""

    name: str
    testament: str
    verses: list[str]

    @property
    def text(self) -> str:
        return "".join(f"{verse}\n" for verse in self.verses)


def printed(file: Path | None) -> str:
    """The text as the program prints it, or as it stands in a file."""
    if file is not None:
        return file.read_text("utf-8")
    try:
        done = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"cannot run bible ({error}) - install Debian's bible-kjv, or give --text FILE")
    return done.stdout


def chapters_of(text: str) -> list[Chapter]:
    """Chapters in their order."""
    found: dict[tuple[str, str], Chapter] = {}
    testament, books = "old", dict[str, int]()
    for number, line in enumerate(text.splitlines(), 1):
        verse = VERSE.fullmatch(line)
        if verse is None:
            sys.exit(f"line {number} is no verse, such as 'Ge1:1 In the beginning ...': {line[:60]!r}")
        book, chapter = verse["book"], verse["chapter"]
        if book == NEW_TESTAMENT:
            testament = "new"
        place = books.setdefault(book, len(books) + 1)
        name = f"{place:02d}-{book}-{int(chapter):03d}"
        found.setdefault((book, chapter), Chapter(name, testament, [])).verses.append(verse["text"])
    return list(found.values())


def split(chapters: list[Chapter], seed: int = 0) -> dict[str, list[Chapter]]:
    """Every tenth of a shuffled order is held back; both parts are in the order of the book."""
    held = set(np.random.default_rng(seed).permutation(len(chapters))[: len(chapters) // 10].tolist())
    return {
        part: [chapter for i, chapter in enumerate(chapters) if (i in held) == (part == "val")]
        for part in SPLITS
    }


def passages_of(chapter: Chapter) -> list[str]:
    """Whole verses, as many as fit into a row between the words that begin and end it; no long verse."""
    found, passage = [], ""
    for verse in chapter.verses:
        line = f"{verse}\n"
        if passage and len(f"{passage}{line}".encode()) > CONTEXT - 2:
            found.append(passage)
            passage = ""
        passage += line
    return [text for text in [*found, passage] if len(text.encode()) <= CONTEXT - 2]


def write_chapters(folder: Path, parts: dict[str, list[Chapter]]) -> None:
    """``train/NAME.txt`` and ``val/NAME.txt``; a folder that is there is left as it is."""
    _write(folder, {f"{part}/{c.name}.txt": c.text for part, group in parts.items() for c in group})


def write_passages(folder: Path, parts: dict[str, list[Chapter]], most: int) -> None:
    """``train/old/NAME.txt`` and so on: as many of each testament, spread evenly; in val a quarter."""
    files = {}
    for part, count in zip(SPLITS, (most, most // 4), strict=True):
        for testament in ("old", "new"):
            own = [
                (f"{chapter.name}-{i:02d}", text)
                for chapter in parts[part]
                if chapter.testament == testament
                for i, text in enumerate(passages_of(chapter))
            ]
            if len(own) < count:
                sys.exit(
                    f"{len(own)} passages of the {testament} testament in {part}, not {count} - take fewer"
                )
            chosen = np.linspace(0, len(own) - 1, count).round().astype(int) if count else []
            files |= {f"{part}/{testament}/{own[i][0]}.txt": own[i][1] for i in chosen}
    _write(folder, files)


def _write(folder: Path, files: dict[str, str]) -> None:
    """Aside, and renamed when whole; what stands there must be the same."""
    if folder.is_dir():
        there = {str(p.relative_to(folder)) for p in folder.rglob("*.txt")}
        if there != set(files) or any((folder / p).read_text("utf-8") != text for p, text in files.items()):
            sys.exit(f"{folder} holds something else - it is left as it is; take another OUT")
        return
    aside = folder.with_name(f".{folder.name}.part")
    for path, text in files.items():
        (aside / path).parent.mkdir(parents=True, exist_ok=True)
        (aside / path).write_text(text, "utf-8")
    aside.rename(folder)


def trained(folder: Path, data: Path, **options: Any) -> Run:
    if (folder / "result.json").is_file():
        return open_run(folder)
    resume = (folder / "config.yaml").is_file()
    args = {"context": CONTEXT}
    return train(
        str(data),
        out=str(folder),
        resume=resume,
        progress=False,
        tokenizer="bytes",
        model_args=args,
        **options,
    )


def passes(data: Path, size: float) -> float:
    """Epochs in which so many bytes are read."""
    return size / sum(file.stat().st_size for file in (data / "train").rglob("*.txt"))


def pretrained(asked: argparse.Namespace, data: Path, name: str, seed: int) -> Run:
    epochs = passes(data, asked.bytes)
    return trained(
        asked.out / "runs" / f"{name}-s{seed}",
        data,
        objective="masked-lm" if name in MASKED else "causal-lm",
        model=name,
        seed=seed,
        epochs=epochs,
        eval_every=epochs / 4,
        **RECIPE,
    )


def learnt(asked: argparse.Namespace, data: Path) -> Iterator[dict[str, Any]]:
    """Seed by seed, so that a run that is stopped early has compared everything."""
    for seed in asked.seeds:
        for name in asked.models:
            run = pretrained(asked, data, name, seed)
            yield {
                "model": name,
                "seed": seed,
                "parameters": sum(p.numel() for p in run.model.parameters()),
                "bits per byte": run.measures["bits per byte"],
                "word accuracy": run.measures["word accuracy"],
                "seconds": run.seconds,
            }


def classified(asked: argparse.Namespace, data: Path, passages: Path) -> Iterator[dict[str, Any]]:
    """Each masked model, from what it has learnt and from scratch."""
    for seed in asked.seeds:
        for name in asked.models:
            before = pretrained(asked, data, name, seed)
            for begun in ("learnt", "scratch"):
                recipe = (
                    {**FINE_TUNING, "init_from": str(before.out), "new_head": True}
                    if begun == "learnt"
                    else RECIPE
                )
                run = trained(
                    asked.out / "runs" / f"{name}-testament-{begun}-s{seed}",
                    passages,
                    objective="text-classification",
                    model=name,
                    seed=seed,
                    epochs=asked.epochs,
                    eval_every=asked.epochs,
                    **recipe,
                )
                yield {
                    "model": name,
                    "begins": begun,
                    "seed": seed,
                    "parameters": sum(p.numel() for p in run.model.parameters()),
                    "masked loss": before.measures["loss"],
                    "accuracy": run.accuracy,
                    "seconds": run.seconds,
                }


def measured(names: tuple[str, ...], rounds: int = 3) -> dict[str, dict[str, float]]:
    """Milliseconds and peak memory (MB) of a training step, one model after the other, round by round.

    Memory is what the process takes beyond what it took before the model was built: weights, gradients, the
    optimiser's state, and what is kept for the backward pass.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    spawn = multiprocessing.get_context("spawn")
    for turn in range(rounds):
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            with spawn.Pool(1) as pool:
                found[name].append(pool.apply(step_cost, (name,)))
    return {
        name: {"step ms": median(ms for ms, _ in own), "peak MB": median(mb for _, mb in own)}
        for name, own in found.items()
    }


def step_cost(name: str, steps: int = 5) -> tuple[float, float]:
    """Of one model, in this process: the fastest step in ms, and the memory at its peak in MB."""
    import torch
    from torch.nn import functional as F

    from pellucid.models import create_model
    from pellucid.training.recipe import MuonAdamW

    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")

    def peak() -> float:
        if cuda:
            return torch.cuda.max_memory_allocated() / 1e6
        status = Path("/proc/self/status")
        if status.is_file():
            return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1e3
        scale = 1e6 if sys.platform == "darwin" else 1e3
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale

    def take(count: int, rows: int, **sizes: int) -> list[float]:
        model = create_model(name, **sizes).to(device)
        optimizer = MuonAdamW(model, RECIPE["lr"], RECIPE["matrix_lr"], 0.05)
        ids = torch.randint(0, 256, (rows, model.context), device=device)
        times = []
        for _ in range(count):
            began = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
            optimizer.step()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return times

    take(1, 1, context=8, depth=1)  # what is loaded and made when first used
    before = peak()
    times = take(steps, RECIPE["batch_size"], context=CONTEXT)
    return min(times) * 1e3, peak() - before


def table(found: list[dict[str, Any]], keys: tuple[str, ...], columns: dict[str, int]) -> str:
    """Mean and standard deviation over seeds; ``columns`` with how many digits."""
    lines = [" | ".join(["", *keys, "parameters", *columns, ""]).strip()]
    lines.append("|" + "---|" * (len(keys) + 1 + len(columns)))
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in found):
        own = [row for row in found if tuple(row[k] for k in keys) == key]
        cells = [_spread([row[name] for row in own], digits) for name, digits in columns.items()]
        lines.append("| " + " | ".join([*key, f"{own[0]['parameters']:,}", *cells]) + " |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    text = f"{mean(values):,.{digits}f}"
    return text if len(set(values)) == 1 else f"{text} ± {stdev(values):.{digits}f}"


def beside(found: list[dict[str, Any]], name: str) -> None:
    """What each row has of ``name``, in per cent more than the baseline's mean."""
    base = [row[name] for row in found if row["model"] in BASELINES]
    if base:
        for row in found:
            row["% to baseline"] = 100 * (row[name] / mean(base) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, help="verses, one a line, in place of running bible")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=[*CAUSAL, *MASKED])
    parser.add_argument("--bytes", type=float, default=2e6, help="of text that each run reads")
    parser.add_argument("--classify", action="store_true")
    parser.add_argument("--passages", type=int, default=1000, help="of each testament to learn from")
    parser.add_argument("--epochs", type=float, default=3, help="over the passages")
    asked = parser.parse_args()
    known = MASKED if asked.classify else CAUSAL
    asked.models = tuple(asked.models or known)
    if wrong := [name for name in asked.models if name not in known]:
        parser.error(f"{wrong[0]} is none of {', '.join(known)}")
    parts = split(chapters_of(printed(asked.text)))
    write_chapters(asked.out / "chapters", parts)
    if asked.classify:
        passages = asked.out / f"passages-{asked.passages}"
        write_passages(passages, parts, asked.passages)
        rows = classified(asked, asked.out / "chapters", passages)
    else:
        rows = learnt(asked, asked.out / "chapters")
    found = []
    for row in rows:
        print(json.dumps(row), flush=True)
        found.append(row)
    costs = measured(asked.models)
    for row in found:
        row |= costs[row["model"]]
    own = {"seconds": 0, "step ms": 0, "peak MB": 0}
    if asked.classify:
        print(table(found, ("model", "begins"), {"masked loss": 3, "accuracy": 4, **own}))
    else:
        beside(found, "bits per byte")
        columns = {"bits per byte": 4, "% to baseline": 2, "word accuracy": 4, **own}
        print(table(found, ("model",), columns))
    name = "testaments.json" if asked.classify else "bible.json"
    (asked.out / name).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
