r"""What the atoms of a layer's dictionary respond to, and what can be said of it in a list of words.

CRATE's code is sparse by construction, and the published study of it on text (Bai and Ma 2024, arXiv
2410.16443) scores how well single entries of it can be explained: somebody writes down what a neuron
responds to, somebody else tells from that note how strongly it responds at every word of other text, and the
score is the correlation of what was told with what is the case (Bills et al. 2023). There both are large
language models.

Here the note is the simplest one that there is, and can be written without any model: a list that gives a
response to every word of the vocabulary. It is made from one half of the windows, and read on the other,

.. math::
    s = \operatorname{corr}_B\bigl(a_t,\ \hat a(w_t)\bigr), \qquad
    \hat a(w) = \operatorname{mean}_A \{a_t : w_t = w\},

once for the word at which the atom responds and once for the word that follows, and the larger counts. 1
means that the word says all, 0 that it says nothing. An atom that responds to something else than single
words, such as a quotation or a topic, has a low score too: this measures how far the simplest kind of note
goes. It does so alike for atoms of a dictionary and for hidden units of an MLP, which have no dictionary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from pellucid.errors import ConfigError, DataError
from pellucid.measure.cache import code
from pellucid.measure.watch import Sighting, Text, arguments, input_batches, watch
from pellucid.models.language import LanguageModel
from pellucid.models.modes import in_eval_mode
from pellucid.steps import ISTA, MLP, OvercompleteISTA, SoftISTA, Step

TOP = 10
"""Contexts kept of each atom."""

BEFORE, AFTER = 24, 8
"""Words kept on either side of the one at which an atom responds."""

DIFFERENT = 1024
"""Words that are told apart in a list: those met first, the rest counting as one more."""

NO_WORD = -1
"""What stands in a context in front of a window's first word and behind its last."""

TOLD_BY = ("word", "next")
"""What a list may go by: the word at which an atom responds, or the one that follows."""


@dataclass(frozen=True)
class Atoms:
    """What the m atoms of one layer respond to.

    A context is ``BEFORE`` words, the one at which the atom responds, and ``AFTER`` more. Of each window only
    the strongest place is kept, so that contexts are of different texts.

    Attributes:
        layer: from 1.
        step: its name, such as ``sparsify``.
        kind: ``atoms`` of a dictionary, or ``units`` of an MLP.
        positions: places that were looked at.
        fires: share of the places at which each responds, ``(m,)``; an MLP's unit where it is above zero.
        mean: its mean response where it fires, ``(m,)``; zero where it never does.
        score: see the head of this module, ``(m,)``; NaN of an atom whose response does not change in both
            halves.
        told_by: the kind of list that the score is of, an index into :data:`TOLD_BY`, ``(m,)``.
        values: the strongest responses, largest first, ``(k, m)``; zero where there are not so many.
        contexts: their words, ``(k, m, BEFORE + 1 + AFTER)``, :data:`NO_WORD` outside of the window.
        windows: which windows they are of, in the order in which they were read, ``(k, m)``; -1 where there
            are not so many.
        common: share of the places at which each word stands, ``(v,)``.
    """

    layer: int
    step: str
    kind: str
    positions: int
    fires: Float[Tensor, " m"]
    mean: Float[Tensor, " m"]
    score: Float[Tensor, " m"]
    told_by: Int[Tensor, " m"]
    values: Float[Tensor, "k m"]
    contexts: Int[Tensor, "k m c"]
    windows: Int[Tensor, "k m"]
    common: Float[Tensor, " v"]

    def __len__(self) -> int:
        return len(self.fires)

    def summary(self) -> dict[str, Any]:
        """The layer in numbers: how many atoms, dead ones, the mean share at which they fire, their scores.

        ``score`` is the mean over the atoms that ever fire, ``quartiles`` theirs too; ``clear`` the share of
        all atoms that a list of words tells with a correlation above 0.5.
        """
        known = self.score[self.score.isfinite()].double()
        quartiles = known.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=known.dtype)).tolist()
        return {
            "layer": self.layer,
            "step": self.step,
            "kind": self.kind,
            "count": len(self),
            "dead": int((self.fires == 0).sum()),
            "positions": self.positions,
            "fires": self.fires.double().mean().item(),
            "score": known.mean().item() if len(known) else None,
            "quartiles": quartiles if len(known) else None,
            "clear": int((known > 0.5).sum()) / len(self),
        }

    def ranked(self) -> list[int]:
        """All that have a score, the clearest first; among equals the earlier."""
        order = self.score.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
        return order[: int(self.score.isfinite().sum())].tolist()

    def describe(self, atom: int) -> dict[str, Any]:
        """One atom: its numbers, and its contexts, the strongest first.

        ``word`` is the commonest among the words that its list goes by in the strongest contexts, ``purity``
        its share there, and ``common`` its share of all places, which purity has to be seen beside.
        """
        by_next = TOLD_BY[int(self.told_by[atom])] == "next"
        there = [k for k in range(len(self.values)) if self.windows[k, atom] >= 0]
        contexts: list[list[int]] = [self.contexts[k, atom].tolist() for k in there]
        met = Counter(words[BEFORE + by_next] for words in contexts)
        met.pop(NO_WORD, None)
        word, times = min(met.items(), key=lambda item: (-item[1], item[0]), default=(None, 0))
        score = self.score[atom].item()
        return {
            "atom": atom,
            "fires": self.fires[atom].item(),
            "mean": self.mean[atom].item(),
            "score": score if score == score else None,
            "told_by": "next" if by_next else "word",
            "word": word,
            "purity": times / len(there) if there else None,
            "common": self.common[word].item() if word is not None else None,
            "contexts": [
                {
                    "value": self.values[k, atom].item(),
                    "window": int(self.windows[k, atom]),
                    "words": words,
                    "at": BEFORE,
                }
                for k, words in zip(there, contexts, strict=True)
            ],
        }


@torch.no_grad()
def read_atoms(
    model: LanguageModel,
    batches: Iterable[Any],
    *,
    layers: Collection[int] | None = None,
    top: int = TOP,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Atoms]:
    """What the atoms respond to in a text that is read once.

    Kept are, for each atom, ``top`` contexts and four numbers for each of at most ``DIFFERENT`` words,
    however long the text: 13 MB for a layer of 768 atoms, and 50 MB for 3,072.

    Args:
        model: causal or masked. Its layers that have a dictionary or an MLP are looked at.
        batches: of text, or tuples that begin with it. In a causal model the places that count are those
            with a target, so that none is met twice; in a masked one all that are no padding.
        layers: only these, from 1.
        top: contexts to keep of each atom.
        limit: read no more than so many windows.
        progress: called with the number of windows after each batch.

    Raises:
        DataError: fewer than two windows: a list is made from one half and read on the other.
        ConfigError: no layer has atoms, or none of ``layers`` does.
    """
    if top < 1:
        raise ConfigError(f"top is {top}; keep at least one context of each atom")
    device = next(model.parameters()).device
    reading = _Reading(model, top)
    looks: dict[tuple[int, str], _Look] = {}

    def see(sighting: Sighting) -> None:
        if sighting.record is None or (layers is not None and sighting.layer not in layers):
            return
        responses = code(sighting.record)
        if responses is not None:
            if isinstance(sighting.record.step, SoftISTA):
                responses = responses.abs()
            key = (sighting.layer, sighting.name)
            looks.setdefault(key, _Look(sighting.record.step, reading)).add(responses.float())

    with in_eval_mode(model):
        for text in input_batches(batches, device, limit):
            reading.turn_to(text, model.causal)
            watch(model, text, see)
            reading.windows += len(reading.ids)
            if progress is not None:
                progress(len(reading.ids))
    if reading.windows < 2:
        given = "one window" if reading.windows else "no window"
        raise DataError(f"{given} of text - give at least two, one to make a list from and one to read it on")
    if not looks:
        which = "" if layers is None else f" in layers {sorted(layers)}"
        raise ConfigError(
            f"no atoms and no hidden units{which} - this model has layers 1 to {len(model.layers)}"
        )
    return [look.atoms(layer, name) for (layer, name), look in sorted(looks.items())]


@torch.no_grad()
def pushed_words(
    model: LanguageModel, layer: int, step: str, atoms: Collection[int], count: int = 5
) -> list[dict[str, list[tuple[int, float]]]]:
    r"""The words that each atom speaks for, and against, if nothing stood between its layer and the words.

    The token is taken to be what one unit of the atom adds to it, brought to the length that the last norm
    gives, and read off the table of words as the model's own tokens are:
    :math:`s = W\,(\gamma \odot \mathrm{centred}(v) / \sigma(v))`, with its mean over words taken off. In the
    last layer little stands between; in the first ones the layers above do to it what they like.

    Args:
        model: causal; a masked one has a layer more in front of its words.
        layer: from 1.
        step: such as ``sparsify``.
        atoms: which.
        count: how many words to name, ``for`` and ``against``, each with its score.

    Raises:
        ConfigError: a masked model, or a step without atoms.
    """
    if not model.causal:
        raise ConfigError("a masked model reads its words behind one layer more - take a causal one")
    spoken = _spoken(model.layers[layer - 1][step])[:, list(atoms)].mT  # type: ignore[index]
    norm: Any = model.norm
    spoken = F.normalize(spoken, dim=-1) * spoken.shape[-1] ** 0.5
    if getattr(norm, "weight", None) is not None:
        spoken = F.layer_norm(spoken, spoken.shape[-1:], norm.weight, None, norm.eps)
    scores = spoken @ model.embed.words.weight.mT
    scores = (scores - scores.mean(-1, keepdim=True)).float()
    found = []
    for row in scores:
        ends = {"for": row.topk(min(count, len(row))), "against": (-row).topk(min(count, len(row)))}
        found.append(
            {side: [(int(word), float(row[word])) for word in best.indices] for side, best in ends.items()}
        )
    return found


def _spoken(step: Step) -> Float[Tensor, "d m"]:
    """What one unit of each atom adds to a token."""
    if isinstance(step, ISTA):
        return torch.eye(step.dictionary.shape[1], device=step.dictionary.device)
    if isinstance(step, OvercompleteISTA):
        atoms = step.dictionary.shape[1]
        return step.decode(torch.eye(atoms, device=step.dictionary.device)[None])[0].mT
    if isinstance(step, MLP):
        scale = step.layer_scale
        return step.fc2.weight if scale is None else scale[:, None] * step.fc2.weight
    raise ConfigError(f"{type(step).__name__} has no atoms - take a step that sparsifies, or an MLP")


class _Reading:
    """The text that is being read: of the batch at hand which places count, and the class of their words."""

    def __init__(self, model: LanguageModel, top: int) -> None:
        device = next(model.parameters()).device
        self.top, self.windows = top, 0
        self.classes = min(model.vocab_size, DIFFERENT) + 2  # the rest, and where there is no word
        self.class_of = torch.full((model.vocab_size,), -1, device=device)
        self.known = 0
        self.counts = torch.zeros(2, 2, self.classes, dtype=torch.float64, device=device)
        """Of each half and each kind of list, how often each class was met."""
        self.common = torch.zeros(model.vocab_size, dtype=torch.float64, device=device)

    def turn_to(self, text: Tensor | Text, causal: bool) -> None:
        self.ids = text if isinstance(text, Tensor) else text.ids
        b, n = self.ids.shape
        given = arguments(text)
        real = given[1] if len(given) > 1 else torch.ones_like(self.ids, dtype=torch.bool)
        following = F.pad(self.ids, (0, 1), value=NO_WORD)[:, 1:].masked_fill(
            ~F.pad(real, (0, 1))[:, 1:], NO_WORD
        )
        self.places = real
        if causal and not isinstance(text, Tensor):
            counts = text.targets >= 0
            self.places = counts if bool(counts.any()) else real
            following = torch.where(counts, text.targets, following)
        self.shown = torch.where(real, self.ids, NO_WORD)  # what a context shows
        self.numbers = torch.arange(self.windows, self.windows + b, device=self.ids.device)
        half = (self.numbers % 2)[:, None].expand(b, n)[self.places]
        words = torch.stack([self.ids[self.places], following[self.places]])
        self.common += torch.bincount(words[0], minlength=len(self.common))
        self._meet(words[0])
        classes = torch.where(words < 0, self.classes - 1, self._classes(words.clamp_min(0)))
        self.halves = [half == h for h in (0, 1)]
        self.words = [[row[which] for row in classes] for which in self.halves]
        for h in (0, 1):
            for by in (0, 1):
                self.counts[h, by] += torch.bincount(self.words[h][by], minlength=self.classes)
        self.following = following

    def _meet(self, words: Tensor) -> None:
        """Words that have not been met get a class of their own, in the order of their numbers."""
        new = words[self.class_of[words] < 0].unique()
        new = new[: max(0, self.classes - 2 - self.known)]
        self.class_of[new] = torch.arange(self.known, self.known + len(new), device=new.device)
        self.known += len(new)

    def _classes(self, words: Tensor) -> Tensor:
        own = self.class_of[words]
        return torch.where(own < 0, self.classes - 2, own)


class _Look:
    """Running sums of the responses in one layer, and the strongest of them."""

    def __init__(self, step: Step, reading: _Reading) -> None:
        self.reading = reading
        self.kind = "units" if isinstance(step, MLP) else "atoms"
        self.sums: Tensor | None = None

    def _begin(self, m: int, device: torch.device) -> None:
        reading = self.reading
        width = BEFORE + 1 + AFTER
        self.sums = torch.zeros(2, 2, reading.classes, m, device=device)
        """Of each half and kind of list, the sum of responses at each class of words."""
        self.squares = torch.zeros(2, m, dtype=torch.float64, device=device)
        self.total = torch.zeros(m, dtype=torch.float64, device=device)
        self.fired = torch.zeros(m, dtype=torch.float64, device=device)
        self.values = torch.zeros(reading.top, m, device=device)
        self.windows = torch.full((reading.top, m), -1, device=device)
        self.contexts = torch.full((reading.top, m, width), NO_WORD, device=device)

    def add(self, responses: Float[Tensor, "b n m"]) -> None:
        reading = self.reading
        if self.sums is None:
            self._begin(responses.shape[-1], responses.device)
        assert self.sums is not None
        flat = responses[reading.places]
        for h, which in enumerate(reading.halves):
            part = flat[which]
            for by, classes in enumerate(reading.words[h]):
                self.sums[h, by].index_add_(0, classes, part)
            self.squares[h] += part.double().square().sum(0)
        self.total += (flat.clamp_min(0)).double().sum(0)
        self.fired += (flat > 0).double().sum(0)
        self._keep_strongest(responses)

    def _keep_strongest(self, responses: Float[Tensor, "b n m"]) -> None:
        reading = self.reading
        best, place = responses.masked_fill(~reading.places[..., None], -torch.inf).max(1)  # (b, m)
        kept, row = (part[: reading.top] for part in best.sort(dim=0, descending=True, stable=True))
        ranked, order = torch.cat([self.values, kept]).sort(dim=0, descending=True, stable=True)
        values, order = ranked[: reading.top], order[: reading.top]
        windows = torch.cat([self.windows, reading.numbers[row]]).gather(0, order)
        shown = F.pad(reading.shown, (BEFORE, AFTER), value=NO_WORD)
        offsets = torch.arange(BEFORE + 1 + AFTER, device=row.device)
        context = shown[row[..., None], place.gather(0, row)[..., None] + offsets]
        contexts = torch.cat([self.contexts, context])
        self.contexts = contexts.gather(0, order[..., None].expand(-1, -1, contexts.shape[-1]))
        silent = values <= 0  # a place at which an atom does not respond is no context of its own
        self.windows = windows.masked_fill(silent, -1)
        self.contexts.masked_fill_(silent[..., None], NO_WORD)
        self.values = values.clamp_min(0)

    def atoms(self, layer: int, name: str) -> Atoms:
        assert self.sums is not None
        reading = self.reading
        positions = int(reading.counts[:, 0].sum())
        score, told_by = self._scores()
        fires = self.fired / positions
        return Atoms(
            layer=layer,
            step=name,
            kind=self.kind,
            positions=positions,
            fires=fires.cpu(),
            mean=(self.total / self.fired.clamp_min(1)).cpu(),
            score=score.cpu(),
            told_by=told_by.cpu(),
            values=self.values.cpu(),
            contexts=self.contexts.cpu(),
            windows=self.windows.cpu(),
            common=(reading.common / positions).cpu(),
        )

    def _scores(self) -> tuple[Tensor, Tensor]:
        """Each way round once: a list from one half read on the other; the mean of both correlations."""
        both = torch.stack([(self._read(0, 1, by) + self._read(1, 0, by)) / 2 for by in (0, 1)])
        score, told_by = both.nan_to_num(nan=-torch.inf).max(0)
        return torch.where(score.isfinite(), score, torch.nan), told_by

    def _read(self, made: int, read: int, by: int) -> Float[Tensor, " m"]:
        """Correlation of the responses in one half with what a list from the other says of them."""
        assert self.sums is not None
        count, there = self.reading.counts[made, by], self.reading.counts[read, by]
        sums, found = self.sums[made, by].double(), self.sums[read, by].double()
        mean = sums.sum(0) / count.sum()
        told = torch.where(count[:, None] > 0, sums / count.clamp_min(1)[:, None], mean)
        told = told - there @ told / there.sum()
        own = found.sum(0) / there.sum()
        shared = (told * found).sum(0) / there.sum()
        spread_told = there @ told.square() / there.sum()
        spread = self.squares[read] / there.sum() - own.square()
        # What is left of a difference of squares in float32 is no spread.
        spread = torch.where(spread > 1e-6 * self.squares[read] / there.sum(), spread, torch.nan)
        moved = spread_told > 1e-12 * own.square()
        corr = shared / (spread_told * spread).sqrt()
        return torch.where(moved | spread.isnan(), corr, 0.0)
