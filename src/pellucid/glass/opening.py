"""From what a user names to answers about it: a run, a folder of runs, a model, or a file of answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pellucid.data import ImageData, ImageRejected, load_data, read_image, show_name
from pellucid.errors import ConfigError, DataError, PellucidError
from pellucid.glass.answers import FORMAT, Answers, Input, NotThere, Subject, sample_inputs, subject_of
from pellucid.glass.packed import MAGIC, unpack
from pellucid.glass.shelf import Shelf
from pellucid.measure.inside import steps_of
from pellucid.models import create_model, load
from pellucid.models.language import LanguageModel
from pellucid.training import Run, load_images, open_run

Say = Callable[[str], None]


def open_target(
    target: str,
    images: Sequence[Path] = (),
    *,
    data: str | None = None,
    runs: Path | None = None,
    beside: Sequence[Path] | None = None,
    pretrained: bool = False,
    download: bool = False,
    data_root: str | None = None,
    max_bad: float | None = None,
    say: Say = lambda line: None,
) -> Answers | Kept:
    """Answers about ``target``.

    Args:
        target: a run's folder, finished or not; a folder of runs, of which the latest finished one is opened;
            a ``model/`` folder; the name of a model; or a file that ``pellucid audit --bundle`` wrote.
        images: picture files to look at, in front of some of the data's test images.
        data: what to audit on; a run's own images unless given.
        runs: a folder of runs to list.
        beside: runs to stand beside it; those that were trained beside it unless given.
        pretrained: of a timm name, its published weights.
        download, data_root, max_bad: as of :func:`pellucid.load_data`.
        say: gets a line where something is left out.

    Raises:
        ConfigError, CheckpointError, DataError: what cannot be opened.
    """
    path = Path(target)
    if path.is_file():
        if images or data or beside:
            raise ConfigError(f"{target} holds answers already - leave out images, data and other runs")
        return Kept.read(path)
    given = [Input(show_name(image.name), picture=_picture(image)) for image in images]

    def loaded(own: Run | None) -> ImageData | None:
        if data is None and own is None:
            return None
        try:
            if data is None:
                assert own is not None
                return load_images(own.config)
            bad = 0.01 if max_bad is None else max_bad
            return load_data(data, labels="optional", download=download, root=data_root, max_bad=bad)
        except DataError as error:
            if data is not None:
                raise
            say(f"without the run's own images: {error}")
            return None

    shelf = None if runs is None else Shelf(_folder(runs))
    subjects: list[Subject] = []
    title = path.resolve().name if path.is_dir() else target
    if path.is_dir() and not (path / "config.json").is_file():
        shelf = shelf or Shelf(path)
        run_folder = _latest(path)
        if run_folder is None:
            say(f"no finished run in {path} yet: the page shows how they go")
        else:
            run = _run(run_folder)
            found = loaded(run)
            subjects.append(subject_of(run, found))
            others = sorted(run_folder.glob("beside-*")) if beside is None else beside
            subjects += [
                subject_of(_run(other), found)
                for other in others
                if beside is not None or (other / "model" / "config.json").is_file()
            ]
    else:
        found = loaded(None)
        model: Any = load(path) if path.is_dir() else create_model(target, pretrained=pretrained)
        name = getattr(model, "architecture", target)
        fresh = not path.is_dir() and not pretrained
        subject = Subject(_looked_into(model, target).eval(), name, found, {"fresh": fresh})
        subjects.append(subject)
        subjects += [subject_of(_run(other), found) for other in beside or ()]
    samples = sample_inputs(subjects[0].data) if subjects and subjects[0].data is not None else []
    return Answers(title, subjects, [*given, *samples], shelf=shelf, takes_inputs=bool(subjects))


class Kept:
    """Answers that were written into a file: the same questions, without a model."""

    takes_inputs = False

    def __init__(self, answers: dict[str, Any]) -> None:
        self.kept = answers

    @classmethod
    def read(cls, path: Path) -> Kept:
        """From a file that ``pellucid audit --bundle`` wrote.

        Raises:
            DataError: another kind of file, or a damaged one.
        """
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise DataError(
                    f"{path} is no bundle - name a run's folder, a model, or what audit --bundle wrote"
                )
        content = unpack(path.read_bytes())
        answers = content.get("answers") if isinstance(content, dict) else None
        if not isinstance(answers, dict) or content.get("format") != FORMAT or "overview" not in answers:
            raise DataError(f"{path} holds no answers about a model - write it again")
        return cls(answers)

    def overview(self) -> Any:
        return self._of("overview")

    def audit(self, model: int) -> Any:
        return self._of(f"models/{model}/audit")

    def look(self, model: int, number: int) -> Any:
        return self._of(f"looks/{model}/{number}")

    def layer(self, model: int, number: int, layer: int) -> Any:
        return self._of(f"looks/{model}/{number}/layers/{layer}")

    def runs(self) -> Any:
        return self._of("runs")

    def curves(self, name: str) -> Any:
        return self._of(f"runs/{name}")

    def add(self, what: Input) -> int:
        raise ConfigError("a file of answers takes no other inputs - open the run itself")

    def _of(self, question: str) -> Any:
        if question not in self.kept:
            raise NotThere("not in this file")
        return self.kept[question]


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder - name the folder that holds the runs")
    return path


def _latest(path: Path) -> Path | None:
    """The run at ``path`` or the latest of those in it that has a model; None where none has one yet.

    Raises:
        ConfigError: no run there at all.
    """
    if (path / "config.yaml").is_file():
        return path if (path / "model" / "config.json").is_file() else None
    if (path / "model" / "config.json").is_file():
        return path
    runs = [config.parent for config in path.glob("*/config.yaml")]
    if not runs:
        raise ConfigError(f"{path} holds no run and no model - name the folder that train made")
    done = [run for run in runs if (run / "model" / "config.json").is_file()]
    return max(done, key=lambda run: (run / "model" / "config.json").stat().st_mtime, default=None)


def _run(path: Path) -> Run:
    return _readable(open_run(path))


def _readable(run: Run) -> Run:
    _looked_into(run.model, str(run.out))
    return run


def _looked_into(model: Any, name: str) -> Any:
    """The model, if the page can show it.

    Raises:
        ConfigError: a model without steps or blocks, or one that reads text.
    """
    if isinstance(model, LanguageModel):
        raise ConfigError(f"{name} reads text; pellucid view shows models for images - take one of those")
    steps_of(model)
    return model


def _picture(path: Path) -> Any:
    try:
        return read_image(path)
    except ImageRejected as error:
        raise DataError(f"{show_name(path)}: {error.reason} - leave it out, or get it again") from error


def answers_of(
    runs: Sequence[Run], images: ImageData, audits: Sequence[dict[str, Any] | None] = ()
) -> Answers | None:
    """Answers about finished runs, for a report; None where none can be looked into.

    Args:
        runs: the subject first.
        images: what all of them were trained on.
        audits: of each, where they are measured already.
    """
    subjects, known = [], {}
    for i, run in enumerate(runs):
        try:
            subjects.append(subject_of(_readable(run), images))
        except PellucidError:  # a ResNet beside a CRATE has nothing to show here
            continue
        if i < len(audits) and audits[i] is not None:
            known[len(subjects) - 1] = audits[i]
    if not subjects:
        return None
    title, shelf = runs[0].out.name, Shelf(runs[0].out)
    return Answers(title, subjects, sample_inputs(images), shelf=shelf, audits=known)


__all__ = ["Kept", "answers_of", "open_target"]
