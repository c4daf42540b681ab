"""A comparison as one HTML file, which loads nothing: style, drawings and all texts are in it.  Light and dark follow
the reader's system."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from activedpo_jax.record import svg
from activedpo_jax.record.page_style import style
from activedpo_jax.record.study_files import (
    METRICS,
    flops_in_words,
    needed_in_words,
    pays_in_words,
    said,
    sentence,
)

_TEXT = 400  # characters of an example that are shown


def html_of(study: Mapping[str, Any], title: str) -> str:
    """The page.

    Args:
      study: of `study.make`.
      title: what the comparison is called.
    """
    plan = study["plan"]
    body = [
        _headline(study, title),
        _plan(study),
        _curves(study),
        _differences(study),
        _costs(study),
        _picks(study),
        _agreement(study),
        _examples(study),
        _runs(study),
        _method(study),
        _recipe(study),
    ]
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style(plan['strategies'], plan['baseline'])}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n<main>\n{"".join(body)}\n</main>\n'
        "</body>\n</html>\n"
    )


def _place(study: Mapping[str, Any], strategy: str) -> int:
    return int(study["plan"]["strategies"].index(strategy))


def _headline(study: Mapping[str, Any], title: str) -> str:
    plan, found = study["plan"], study["differences"]
    baseline = plan["baseline"]
    others = [name for name in plan["strategies"] if name != baseline]
    by_verdict = {word: [n for n in others if n in found and found[n]["verdict"] == word] for word in _HEADLINES}
    parts = [
        _HEADLINES[word].format(names=", ".join(names), baseline=baseline)
        for word, names in by_verdict.items()
        if names
    ]
    headline = ". ".join(parts) or "Nothing can be said"
    items = [
        f'<li class="{found[name]["verdict"] if name in found else "open"}">{escape(sentence(study, name))}</li>'
        for name in others
    ]
    failed = sum(run["state"] == "failed" for run in study["runs"])
    warning = f'<p class="soft">{failed} of {len(study["runs"])} runs failed: <a href="#runs">which, and why</a>.</p>'
    return (
        f'<header><h1>{escape(title)}</h1>\n<p class="headline">{escape(headline)}.</p>\n'
        f'<ul class="verdicts">{"".join(items)}</ul>{warning if failed else ""}</header>\n'
    )


_HEADLINES = {
    "better": "Better than {baseline}: {names}",
    "worse": "Worse than {baseline}: {names}",
    "equal": "No difference from {baseline}: {names}",
    "open": "Not decided: {names}",
}


def _plan(study: Mapping[str, Any]) -> str:
    plan = study["plan"]
    rows = {
        "Primary metric": METRICS[plan["metric"]],
        "Counts as no difference": f"up to ±{plan['margin']:g}",
        "Baseline": plan["baseline"],
        "Level": f"α = {plan['alpha']:.2g}, over all strategies (Holm)",
        "Strategies": ", ".join(plan["strategies"]),
        "Paired seeds": ", ".join(map(str, plan["seeds"])),
        "Labels": f"{plan['labels'][-1]}, in {len(plan['labels']) - 1} rounds",
    }
    return f"<h2>Named before the runs</h2>\n{_list(rows)}\n"


def _curves(study: Mapping[str, Any]) -> str:
    if not study["curves"]:
        return "<h2>Learning curves</h2><p>No run has ended.</p>\n"
    lines = []
    for name, curve in study["curves"].items():
        mean, *limits = (curve["accuracy"][part] for part in ("mean", "low", "high"))
        low, high = ([None if v is None else min(1.0, max(0.0, v)) for v in limit] for limit in limits)
        lines.append(svg.Line(name, _place(study, name), mean, low, high))
    drawing = svg.curves(
        "Held-out accuracy against labels", study["plan"]["labels"], lines, "labels", "held-out accuracy"
    )
    caption = "Mean over seeds; bands are 95% intervals of Student's t over seeds, each strategy by itself."
    return f"<h2>Learning curves</h2>\n{_figure(drawing, caption)}"


def _differences(study: Mapping[str, Any]) -> str:
    plan, rows, spans = study["plan"], [], []
    for name, found in study["differences"].items():
        place = _place(study, name)
        spans.append(svg.Span(name, place, found["mean"], found["low"], found["high"]))
        per_seed = ", ".join(f"{value:+.3f}" for value in found["per_seed"])
        rows.append(
            [
                f'<b class="s{place}">{escape(name)}</b>',
                f"{found['mean']:+.3f}",
                _interval(found["low"], found["high"]),
                _interval(found["low_equivalence"], found["high_equivalence"]),
                _number(found["p_value"], ".2g"),
                _number(found["p_holm"], ".2g"),
                escape(said(found["verdict"], plan["margin"])),
                per_seed,
            ]
        )
    if not rows:
        return ""
    metric, baseline = METRICS[plan["metric"]], plan["baseline"]
    drawing = svg.intervals(
        f"Differences from {baseline}", spans, plan["margin"], f"{metric}, strategy less {baseline}"
    )
    caption = f"95% intervals of paired differences. Within the shaded margin, ±{plan['margin']:g}, they count as none."
    head = ["strategy", "difference", "95% interval", "90% interval", "p", "p, Holm", "verdict", "seed by seed"]
    return f"<h2>Differences from {escape(baseline)}</h2>\n{_figure(drawing, caption)}{_table(head, rows)}"


def _costs(study: Mapping[str, Any]) -> str:
    if not study["costs"]:
        return ""
    baseline, rows = study["plan"]["baseline"], []
    for name, cost in study["costs"].items():
        rows.append(
            [
                f'<b class="s{_place(study, name)}">{escape(name)}</b>',
                escape(needed_in_words(study["labels_needed"].get(name))),
                f"{cost['seconds_a_label']:.3g}",
                flops_in_words(cost["selection_flops_a_label"]),
                flops_in_words(cost["training_flops_a_label"]),
                escape(pays_in_words(cost)),
            ]
        )
    head = [
        *("strategy", f"labels to {baseline}'s final accuracy", "seconds a label"),
        *("FLOPs a label, selection", "FLOPs a label, training", "selection pays where a label costs"),
    ]
    return (
        f"<h2>Labels and costs</h2>\n{_table(head, rows)}"
        '<p class="soft small">Seconds are of this machine, without evaluation, of each round the median over seeds. '
        "FLOPs are counted: 4 for each token and parameter, forward and backward, 2 for a forward pass. Selection pays "
        "where (labels saved) × (price of a label) is more than (extra hours of computing) × (price of an hour), until "
        f"{escape(baseline)}'s final accuracy is reached.</p>\n"
    )


def _picks(study: Mapping[str, Any]) -> str:
    found = study["picks"]
    if not found:
        return ""
    rounds = list(range(1, len(study["plan"]["labels"])))

    def drawn(name: str, y_label: str) -> str:
        none: list[float | None] = [None] * len(rounds)
        lines = [svg.Line(s, _place(study, s), values, none, none) for s, values in found[name].items()]
        return svg.curves(y_label, rounds, lines, "round", y_label, height=260)

    words, shares = found["clusters"]["names"], found["clusters"]["shares"]
    of_clusters = list(zip(*shares.values(), strict=True))
    heat = svg.heat_map("Clusters of prompts", words, list(shares), of_clusters, "of the picks")
    return (
        "<h2>What each strategy picked</h2>\n<h3>Clusters of prompts</h3>\n"
        + _figure(
            heat,
            "Share of a strategy's picks in each cluster of prompts by their words, named by those that weigh most. "
            "Picks at random show what the pool holds.",
        )
        + "<h3>Lengths</h3>\n"
        + _figure(drawn("lengths", "tokens of a response"), "Mean length of the responses picked in each round.")
        + "<h3>Nearest neighbours</h3>\n"
        + _figure(
            drawn("repetition", "similarity to the nearest"),
            "Mean cosine of a pick to the nearest pair that was labelled before it, by their words (tf-idf): 1, its "
            "words were seen before; 0, all are new.",
        )
    )


def _agreement(study: Mapping[str, Any]) -> str:
    pairs = study["picks"].get("agreement", [])
    if not pairs:
        return ""
    names = [name for name in study["plan"]["strategies"] if any(name in pair["strategies"] for pair in pairs)]
    values: list[list[float | None]] = [[None] * len(names) for _ in names]
    rows = []
    for pair in pairs:
        i, j = (names.index(name) for name in pair["strategies"])
        values[i][j] = values[j][i] = pair["overall"]
        by_round = " ".join(f"{value:.0%}" for value in pair["by_round"])
        rows.append(
            [escape(" and ".join(pair["strategies"])), f"{pair['overall']:.0%}", by_round, f"{pair['order']:.2f}"]
        )
    heat = svg.heat_map("Agreement between strategies", names, names, values, "of all pairs labelled by either")
    head = ["strategies", "pairs in common", "after each round", "rank overlap, round 1"]
    return (
        "<h2>Agreement between strategies</h2>\n"
        + _figure(heat, "Pairs that both labelled, by pairs that either labelled (Jaccard), mean over seeds.")
        + _table(head, rows)
    )


def _examples(study: Mapping[str, Any]) -> str:
    examples = study["picks"].get("examples", {})
    out = ["<h2>Picks to read</h2>\n<p>The first of the last round, on the first seed.</p>\n"] if examples else []
    for name, several in examples.items():
        out.append(f'<details><summary><b class="s{_place(study, name)}">{escape(name)}</b></summary>\n')
        for pick in several:
            score = "" if pick["score"] is None else f", score {pick['score']:.3g}"
            out.append(f'<blockquote><p class="soft">{escape(_short(pick["prompt"]))}</p>')
            for side in ("first", "second"):
                chosen = ' class="chosen"' if pick["preference"] == side else ""
                out.append(f"<p{chosen}>{side}: {escape(_short(pick[side]))}</p>")
            out.append(f'<p class="soft small">preferred: {escape(pick["preference"])}{score}</p>')
            if pick["nearest"] is not None:
                near = f"nearest before, {pick['similarity']:.2f}: {_short(pick['nearest'])}"
                out.append(f'<p class="soft small">{escape(near)}</p>')
            out.append("</blockquote>\n")
        out.append("</details>\n")
    return "".join(out)


def _runs(study: Mapping[str, Any]) -> str:
    rows = []
    for run in study["runs"]:
        state = escape(run["state"])
        if run["state"] == "failed":
            state = f'<span class="error">failed in round {run["failed_in_round"]}: {escape(run["error"])}</span>'
        cells = [_number(run["accuracy"], ".3f"), _number(run["metric"], ".3f"), state]
        rows.append([f'<b class="s{_place(study, run["strategy"])}">{escape(run["strategy"])}</b>', str(run["seed"])])
        rows[-1] += [str(run["rounds"]), *cells]
    head = ["strategy", "seed", "rounds", "last accuracy", METRICS[study["plan"]["metric"]], "state"]
    return f'<h2 id="runs">All runs</h2>\n{_table(head, rows)}'


def _method(study: Mapping[str, Any]) -> str:
    plan = study["plan"]
    return (
        "<h2>How to read the verdicts</h2>\n"
        f"<p>Runs of one seed share the pool and its order, the held-out pairs, the starting weights, π_ref and all "
        f"options. Differences are of the same held-out pairs on the same seed; their standard error comes from "
        f"{plan['replicates']:,} replicates of a bootstrap that draws seeds and prompts, and intervals are Student's. "
        "p-values are adjusted over strategies by Holm's method. “Better” and “worse” need an adjusted p of "
        f"{plan['alpha']:.2g} or less; “no difference” needs two one-sided tests, adjusted likewise, to place the "
        f"difference within ±{plan['margin']:g}; everything else is not decided. Runs that failed are in no figure, "
        "and the runs of others on their seeds are then in no difference from them.</p>\n"
    )


def _recipe(study: Mapping[str, Any]) -> str:
    rows = {name: json.dumps(value, ensure_ascii=False) for name, value in study["recipe"].items()}
    everything = escape(json.dumps(study["options"], indent=1, ensure_ascii=False))
    return (
        f"<h2>The recipe</h2>\n<p>The same for all strategies: options that are not as by default.</p>\n{_list(rows)}"
        f"<details><summary>all options, activedpo_jax {escape(study['version'])}</summary><pre>{everything}</pre>"
        "</details>\n"
    )


def _list(rows: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows.items()) + "</dl>"


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Heads are text, cells are HTML."""
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>\n<tbody>{lines}</tbody></table></div>\n'


def _interval(low: float | None, high: float | None) -> str:
    return "–" if low is None else f"{low:+.3f} to {high:+.3f}"


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else f"{value:{spec}}"


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}…"
