"""What the model is: its facts, and what its two steps are for."""

from __future__ import annotations

from pellucid.glass.markup import NONE, Html, formula, paragraph, section, table, tag
from pellucid.glass.reading import Bundle, Model, sequence, words

MEANING = {
    "compress": (
        "compress",
        "moves every token towards the few directions that the layer keeps for its kind, one subspace per "
        "head. It must lower the coding rate R^c(Z | U): the nats that it takes to write the tokens down in "
        "those subspaces.",
    ),
    "sparsify": (
        "sparsify",
        "rewrites every token as a sum of few atoms of the layer’s dictionary. It must lower the LASSO: "
        "the squared error of that sum plus a price for every number that is not zero.",
    ),
}


def model(bundle: Bundle) -> Html:
    """The facts of every model and two sentences on compress and sparsify."""
    facts, steps = _facts(bundle.models), _steps(bundle)
    if not facts and not steps:
        return Html("")
    lead = "Look at the size, and at the two things that every layer is built to do."
    if not steps:
        lead = "Look at the size; this model does not say what its layers are built to do."
    return section(
        "model",
        "What this model is",
        lead,
        tag("div", tag("div", steps) if steps else "", facts, class_="beside"),
    )


def _steps(bundle: Bundle) -> Html:
    """One paragraph per step, white-box models only."""
    names = {step for model in bundle.models for step in model.steps}
    known = [MEANING[name] for name in MEANING if name in names]
    sentences = [tag("p", tag("em", name.capitalize()), " ", formula(text)) for name, text in known]
    black = [model.label for model in bundle.models if model.rows and not set(model.steps) & set(MEANING)]
    if black and known:
        steps = ", ".join(_black_steps(bundle))
        sentences.append(
            paragraph(f"{', '.join(black)}: a black box; its steps ({steps}) state no objective.")
        )
    return Html("".join(sentences))


def _black_steps(bundle: Bundle) -> list[str]:
    return list(dict.fromkeys(s for model in bundle.models for s in model.steps if s not in MEANING))


def _facts(models: list[Model]) -> Html:
    """A table with one row per fact and one column per model."""
    known: list[dict[str, str]] = []
    for each in models:
        pairs = [sequence(fact) for fact in each.fields.values("facts")]
        known.append({words(pair[0]): words(pair[1], NONE) for pair in pairs if len(pair) == 2})
    names = list(dict.fromkeys(name for facts in known for name in facts))
    shown = [(each, facts) for each, facts in zip(models, known, strict=True) if facts]
    if not names:
        return Html("")
    rows = [[name, *(facts.get(name, NONE) for _, facts in shown)] for name in names]
    return table("Facts", ["", *(each.label for each, _ in shown)], rows, sort=False)
