"""Does each layer do its work? The objective of every step before and after it, and where it rose."""

from __future__ import annotations

from pellucid.glass import charts
from pellucid.glass.markup import (
    NONE,
    Cell,
    Html,
    change,
    figure,
    folded,
    formula,
    listed,
    numeric,
    panels,
    paragraph,
    percent,
    plural,
    section,
    shared,
    table,
    tag,
)
from pellucid.glass.reading import DESCENDS_FROM, AuditRow, Bundle, Model, words

STATES = {"falls": ("●", "falls"), "partly": ("○", "mostly falls"), "rises": ("▲", "rises")}
"""Mark and word of each state of a step; the mark alone tells them apart without colour."""

VERDICTS = {None: ("", "verdict"), True: ("● ", "verdict good"), False: ("▲ ", "verdict warn")}


def audit(bundle: Bundle) -> Html:
    """Verdict in words, picture and table for the subject; the others below it."""
    subject = bundle.subject
    lead = (
        "Look for marks left of the line: each step must lower its own objective, measured with that "
        f"layer’s own parameters on the same {subject.sample}s just before and just after it."
    )
    if not subject.rows:
        return section(
            "audit", "Does each layer do its work?", "This model was not audited.", *_others(bundle)
        )
    body = [verdict(subject), picture(subject), audit_table(subject), *_others(bundle)]
    return section("audit", "Does each layer do its work?", lead, *body)


def verdict(model: Model) -> Html:
    """The verdict as measured, the count of steps behind it, and every step that does not descend."""
    said = model.audit.one("verdict")
    text = said.text("text")
    sign, class_ = VERDICTS[model.descends]
    details = [words(detail).replace("->", "→") for detail in said.values("details") if detail is not None]
    return tag(
        "div",
        tag("p", sign, text, class_=class_) if text else "",
        tag("ul", *(tag("li", formula(detail)) for detail in details)) if details else "",
        paragraph(_count(model), _bound(model), _measured_on(model)),
    )


def _count(model: Model) -> str:
    """How many steps fall, mostly fall and rise."""
    rows = model.measured
    if not rows:
        said = f"{model.label} states no objective for its steps, so there is nothing to hold them to."
        return "" if model.audit.one("verdict").text("text") else said
    by_state = {state: [row.name for row in rows if row.state == state] for state in STATES}
    falls, partly, rises = (by_state[state] for state in ("falls", "partly", "rises"))
    enough = f"on at least {percent(DESCENDS_FROM)} of the {model.sample}s"
    if len(falls) == len(rows):
        return f"{_all_of(len(rows))} {enough}."
    parts = [f"{len(falls)} of {plural(len(rows), 'measured step')} lower their objective {enough}"]
    if partly:
        parts.append(f"{len(partly)} on fewer ({listed(partly)})")
    if rises:
        parts.append(f"{len(rises)} {'raises' if len(rises) == 1 else 'raise'} it ({listed(rises)})")
    return listed(parts) + "."


def _all_of(steps: int) -> str:
    """``Both measured steps lower their objective``."""
    if steps == 1:
        return "The one measured step lowers its objective"
    return f"{'Both' if steps == 2 else f'All {steps}'} measured steps lower their objective"


def _bound(model: Model) -> str:
    """Which steps are longer than descent is guaranteed for."""
    past = [row.name for row in model.rows if row.past_bound]
    if not past:
        return ""
    return f"Longer than the bound up to which descent is guaranteed: the step of {listed(past)}."


def _measured_on(model: Model) -> str:
    samples, data = model.audit.integer("samples"), model.audit.text("data")
    if samples is None:
        return f"Measured on {data}." if data else ""
    return f"Measured on {plural(samples, model.sample)}{f' of {data}' if data else ''}."


def picture(model: Model) -> Html:
    """One panel per kind of step, on a common axis: after / before per layer."""
    rows = [row for row in model.measured if row.ratio is not None or row.descended is not None]
    ratios = [row.ratio for row in rows if row.ratio is not None]
    if not rows:
        return Html("")
    domain = (min(ratios, default=0.9), max(ratios, default=1.1))
    steps = list(dict.fromkeys(row.step for row in rows))
    shown = [_panel(model, step, [row for row in rows if row.step == step], domain) for step in steps]
    key = tag(
        "p",
        "The vertical line is the value before the step. After it: "
        f"● lower on at least {percent(DESCENDS_FROM)} of the {model.sample}s. ○ lower, but on fewer. ",
        tag("span", f"▲ higher, on average or on most {model.sample}s.", class_="warn"),
        class_="legend",
    )
    return tag("div", panels(*shown), key)


def _panel(model: Model, step: str, rows: list[AuditRow], domain: tuple[float, float]) -> Html:
    pairs = [
        charts.Pair(
            _layer(row), row.ratio, row.state, change(row.change), percent(row.descended), f"{model.sample}s"
        )
        for row in rows
    ]
    objective = model.audit.one("objectives").text(step) or rows[0].fields.text("objective")
    title = f"{model.label}, {step}: {objective or 'objective'} after the step of each layer, before it = 1"
    measured = [row for row in rows if row.change is not None]
    most = min(measured, key=lambda row: row.change or 0.0, default=None)
    said = ""
    if most is not None and (most.change or 0.0) < 0:
        said = f"The largest fall is in layer {_layer(most)}: {change(most.change)}."
    heading = tag("span", tag("b", step), " must lower ", formula(objective)) if objective else tag("b", step)
    return figure(heading, charts.dumbbell_chart(title, pairs, domain), said)


def _layer(row: AuditRow) -> str:
    return "?" if row.layer is None else str(row.layer)


def audit_table(model: Model) -> Html:
    """Every number of the audit; a column in which nothing was measured is left out."""
    columns: dict[str, list[Cell]] = {
        "layer": [Cell(_layer(row), row.layer) for row in model.rows],
        "step": [Cell(row.step) for row in model.rows],
        "objective": [Cell(formula(row.fields.text("objective", NONE))) for row in model.rows],
        "before": [numeric(row.before) for row in model.rows],
        "after": [numeric(row.after) for row in model.rows],
        "change": [Cell(change(row.change), row.change, "n") for row in model.rows],
        "fell on": [shared(row.descended) for row in model.rows],
        "result": [_result(row) for row in model.rows],
        "coding rate": [numeric(row.fields.number("coding_rate")) for row in model.rows],
        "non-zero": [shared(row.fields.number("nonzero")) for row in model.rows],
        "rank": [numeric(row.fields.number("rank")) for row in model.rows],
        "coherence": [numeric(row.fields.number("coherence")) for row in model.rows],
        "outliers": [shared(row.fields.number("outliers"), 1) for row in model.rows],
        "step size": [numeric(row.fields.number("step_size")) for row in model.rows],
        "bound": [_bound_cell(row) for row in model.rows],
    }
    kept = {
        head: cells
        for head, cells in columns.items()
        if head == "layer" or any(c.shown != NONE for c in cells)
    }
    rows = [list(row) for row in zip(*kept.values(), strict=True)]
    notes = paragraph(
        f"Fell on: share of {model.sample}s on which the objective was lower after the step. Rates in nats; "
        "coding rate, share of non-zeros, rank, coherence and outliers describe the tokens after the step. "
        "Bound: the largest step size for which descent is guaranteed, where there is one.",
        class_="note",
    )
    return tag("div", table(f"Audit of {model.label}, every step", list(kept), rows), notes, class_="many")


def _result(row: AuditRow) -> Cell:
    if row.state is None:
        return Cell(NONE)
    sign, word = STATES[row.state]
    order = {"falls": 0.0, "partly": 1.0, "rises": 2.0}[row.state]
    return Cell(tag("span", f"{sign}\u00a0{word}", class_="warn" if row.state == "rises" else "whole"), order)


def _bound_cell(row: AuditRow) -> Cell:
    cell = numeric(row.fields.number("max_step_size"))
    if not row.past_bound:
        return cell
    return Cell(tag("span", f"▲\u00a0{cell.shown}", class_="warn"), cell.key, "n")


def _others(bundle: Bundle) -> list[Html]:
    """The same for the models beside the subject, folded away."""
    shown = []
    for other in bundle.models[1:]:
        if other.rows:
            body = (verdict(other), picture(other), audit_table(other))
            shown.append(folded(f"The same for {other.label}", *body))
    return shown
