"""From what a user names to answers about it: a run, a folder of runs, a model, or a file of answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pellucid.data import (
    ByteTokenizer,
    ImageData,
    ImageRejected,
    TextData,
    Tokenizer,
    load_data,
    load_text,
    read_image,
    read_tokenizer,
    show_name,
)
from pellucid.data.texts import TextRejected, read_text
from pellucid.errors import ConfigError, DataError, PellucidError
from pellucid.glass import worded
from pellucid.glass.answers import (
    FORMAT,
    Answers,
    Input,
    NotThere,
    Subject,
    samples_of,
    subject_of,
)
from pellucid.glass.feed import text_windows
from pellucid.glass.packed import MAGIC, unpack
from pellucid.glass.shelf import Shelf
from pellucid.measure.inside import steps_of
from pellucid.models import create_model, load
from pellucid.models.language import BYTES, MODELS, LanguageModel
from pellucid.models.saved import tokenizer_of
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
        images: files to look at, in front of some of the held-out data: pictures, or texts for a model that
            reads them.
        data: what to audit on; a run's own held-out data unless given.
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
    bad = 0.01 if max_bad is None else max_bad

    def loaded(model: Any, own: Run | None) -> ImageData | TextData | None:
        """What is held back: of ``data`` where it is given, else the run's own."""
        if data is None and own is None:
            return None
        try:
            if isinstance(model, LanguageModel):
                words, whole = str(_tokenizer_file(path if own is None else own.out)), model.classifier
                labels: Any = "optional" if whole is None else "required"
                if data is not None:
                    return load_text(data, tokenizer=words, labels=labels, max_bad=bad, test_only=True)
                assert own is not None
                its = own.config
                return load_text(its.data, tokenizer=words, labels=labels, max_bad=its.max_bad)
            if data is not None:
                return load_data(data, labels="optional", download=download, root=data_root, max_bad=bad)
            assert own is not None
            return load_images(own.config)
        except DataError as error:
            if data is not None:
                raise
            say(f"without the run's own data: {error}")
            return None

    shelf = None if runs is None else Shelf(_folder(runs))
    subjects: list[Subject] = []
    title = path.resolve().name if path.is_dir() else target
    others: Sequence[Path] = beside or ()
    found: ImageData | TextData | None = None
    run: Run | None = None
    if path.is_dir() and not (path / "config.json").is_file():
        shelf = shelf or Shelf(path)
        run_folder = _latest(path)
        if run_folder is None:
            say(f"no finished run in {path} yet: the page shows how they go")
            others = ()
        else:
            run = _run(run_folder)
            found = loaded(run.model, run)
            subjects.append(_subject(run, found))
            if beside is None:
                inside = sorted(run_folder.glob("beside-*"))
                others = [each for each in inside if (each / "model" / "config.json").is_file()]
    else:
        _refuse_numbers(target)
        model: Any = load(path) if path.is_dir() else create_model(target, pretrained=pretrained)
        steps_of(model)
        found = loaded(model, None)
        name, fresh = getattr(model, "architecture", target), not path.is_dir() and not pretrained
        tokenizer, windows = None, None
        if isinstance(model, LanguageModel):
            tokenizer = _tokenizer(path if path.is_dir() else None)
            windows = text_windows(model, found) if isinstance(found, TextData) else None
        subjects.append(Subject(model.eval(), name, found, {"fresh": fresh}, tokenizer, windows))
    subjects += [_subject(_run(other), found) for other in others]
    _refuse_unlike(subjects)
    given = [_given(file, subjects[0] if subjects else None) for file in images]

    def opened(folder: Path) -> Subject:
        """A run of the shelf, beside the others; audited where it has learnt from the same data."""
        other = _run(folder)
        same = run is not None and other.config.data == run.config.data
        subject = _subject(other, found if same or data is not None else None)
        _refuse_unlike([subjects[0], subject])
        return subject

    return Answers(
        title,
        subjects,
        [*given, *samples_of(subjects)],
        shelf=shelf,
        takes_inputs=bool(subjects),
        opener=opened,
    )


class Kept:
    """Answers that were written into a file: the same questions, without a model."""

    takes_inputs = False
    takes = None

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

    def type(self, text: str) -> int:
        raise ConfigError("a file of answers takes no other inputs - open the run itself")

    def open(self, name: str) -> int:
        raise ConfigError("a file of answers opens no run - open the run itself")

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
    """Raises ConfigError for a model without steps or blocks."""
    steps_of(run.model)
    return run


def _subject(run: Run, data: ImageData | TextData | None) -> Subject:
    if not isinstance(run.model, LanguageModel):
        return subject_of(run, data)
    texts = data if isinstance(data, TextData) else None
    return subject_of(run, texts, _tokenizer(run.out))


def _tokenizer(path: Path | None) -> Tokenizer:
    """What makes words of text for a model.

    Raises:
        ConfigError: nothing says which words its numbers are.
    """
    return ByteTokenizer() if path is None else read_tokenizer(_tokenizer_file(path))


def _refuse_numbers(name: str) -> None:
    """Raises ConfigError for the name of a language model whose words nothing spells; before it is made."""
    known = MODELS.get(name)
    words = BYTES["vocab_size"] if known is None else known.sizes.get("vocab_size", 50304)
    if not Path(name).is_dir() and words != BYTES["vocab_size"]:
        raise ConfigError(
            f"{name} has {words:,} words that are only numbers - name a run, or a model of bytes, such as "
            f"crate_gpt_bytes"
        )


def _tokenizer_file(path: Path) -> Path | str:
    file = tokenizer_of(path)
    if file is None and path.is_dir():
        raise ConfigError(
            f"{path} has no tokenizer.json, so that its words are only numbers - put the one that it was "
            f"trained with into its model/ folder"
        )
    return "bytes" if file is None else file


def _refuse_unlike(subjects: Sequence[Subject]) -> None:
    """Raises ConfigError where models cannot be shown the same input."""
    for other in subjects[1:]:
        first = subjects[0]
        if other.reads != first.reads:
            raise ConfigError(
                f"{other.name} reads {other.reads}s, {first.name} reads {first.reads}s - show them one by one"
            )
        if first.tokenizer is None or other.tokenizer is None:
            continue
        if other.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise ConfigError(f"{other.name} reads other words than {first.name} - show them one by one")
        if other.model.causal != first.model.causal:
            raise ConfigError(
                f"one of {first.name} and {other.name} sees hidden words, the other one does not - show them "
                f"one by one"
            )


def _given(file: Path, subject: Subject | None) -> Input:
    """A file that was named, as the first model reads it; of a long text the beginning."""
    if subject is None or subject.reads == "image":
        return Input(show_name(file.name), picture=_picture(file))
    assert subject.tokenizer is not None
    try:
        text = read_text(file)[: worded.MOST_BYTES].decode(errors="ignore")
    except TextRejected as error:
        raise DataError(f"{show_name(file)}: {error.reason} - leave it out, or get it again") from error
    passage = worded.typed(subject.model, subject.tokenizer, text, cut=True)
    return Input(show_name(file.name), passage=passage)


def _picture(path: Path) -> Any:
    try:
        return read_image(path)
    except ImageRejected as error:
        raise DataError(f"{show_name(path)}: {error.reason} - leave it out, or get it again") from error


def answers_of(
    runs: Sequence[Run], data: ImageData | TextData, audits: Sequence[dict[str, Any] | None] = ()
) -> Answers | None:
    """Answers about finished runs, for a report; None where none can be looked into.

    Args:
        runs: the subject first.
        data: what all of them were trained on.
        audits: of each, where they are measured already.
    """
    subjects: list[Subject] = []
    known = {}
    for i, run in enumerate(runs):
        try:
            opened = _subject(_readable(run), data)
            _refuse_unlike([*subjects[:1], opened])
        except PellucidError:  # a ResNet beside a CRATE has nothing to show here
            continue
        if i < len(audits) and audits[i] is not None:
            known[len(subjects)] = audits[i]
        subjects.append(opened)
    if not subjects:
        return None
    title, shelf = runs[0].out.name, Shelf(runs[0].out)
    return Answers(title, subjects, samples_of(subjects), shelf=shelf, audits=known)


__all__ = ["Kept", "answers_of", "open_target"]
