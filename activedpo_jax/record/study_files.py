"""A comparison as CSV, for other programs, and in short, for people: Markdown, and the words that all reports use."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from activedpo_jax.record.study import Run

COLUMNS = (
    *("strategy", "seed", "state", "round", "labels", "accuracy", "margin", "heldout_loss", "loss", "information_gain"),
    *("seconds", "error"),
)


def csv_of(everything: Sequence[Run]) -> str:
    """A row for every round of every run, in full precision; empty: there is none.  A run that failed has its error in
    every row, and at least one row."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for run in everything:
        head = {"strategy": run.strategy, "seed": run.seed, "state": run.state}
        head |= {"error": run.failure.error if run.failure else ""}
        rounds: list[Any] = list(run.summary["rounds"]) or [{}]
        for entry in rounds:
            row = {name: entry.get(name) for name in COLUMNS if name not in head}
            seconds = sum(entry["seconds"].values()) if entry else None
            writer.writerow({name: _cell(value) for name, value in (head | row | {"seconds": seconds}).items()})
    return out.getvalue()


def _cell(value: Any) -> Any:
    return "" if value is None else repr(value) if isinstance(value, float) else value


METRICS = {"area": "area under the held-out accuracy curve", "final": "final held-out accuracy"}


def said(verdict: str, margin: float) -> str:
    """A verdict in words."""
    return {
        "better": "better",
        "worse": "worse",
        "equal": f"no difference (within ±{margin:g})",
        "open": "not decided",
    }[verdict]


def sentence(study: Mapping[str, Any], strategy: str) -> str:
    """What was found of a strategy."""
    plan, found = study["plan"], study["differences"].get(strategy)
    baseline, metric = plan["baseline"], METRICS[plan["metric"]]
    if found is None:
        return f"{strategy} and {baseline} share no seed on which both ended: nothing can be said."
    head = {
        "better": f"{strategy} is better than {baseline}",
        "worse": f"{strategy} is worse than {baseline}",
        "equal": f"{strategy} and {baseline} do not differ by more than {plan['margin']:g}",
        "open": f"Whether {strategy} and {baseline} differ is not decided",
    }[found["verdict"]]
    if found["low"] is None:
        return f"{head}: {metric} {found['mean']:+.3f}, of one seed, without an interval."
    return (
        f"{head}: {metric} {found['mean']:+.3f} ({1 - plan['alpha']:.0%} interval {found['low']:+.3f} to "
        f"{found['high']:+.3f}, p = {found['p_holm']:.2g} after Holm, {len(found['seeds'])} paired seeds)."
    )


def needed_in_words(needed: Mapping[str, Any] | None) -> str:
    """Labels until the baseline's final accuracy."""
    if needed is None:
        return "–"
    if needed["status"] == "reached":
        return f"{needed['labels']:.0f} ({needed['share']:.0%})"
    return {"not reached": "not reached", "no gain": "the baseline gains nothing"}[needed["status"]]


def pays_in_words(cost: Mapping[str, Any]) -> str:
    """From which price a label on selection pays."""
    found = cost.get("break_even")
    if found is None:
        return "–"
    if found["pays"] == "never":
        return "at no price"
    if found["pays"] == "always":
        return "at any price"
    seconds = f"{found['seconds_a_label']:.3g} s of this machine"
    return f"above {seconds}" if found["price"] is None else f"above {found['price']:.3g} ({seconds})"


def flops_in_words(flops: float | None) -> str:
    return "not known" if flops is None else "0" if flops == 0 else f"{flops:.2e}"


def markdown_of(study: Mapping[str, Any]) -> str:
    """Verdicts, differences, labels and costs, failed runs."""
    plan = study["plan"]
    others = [name for name in plan["strategies"] if name != plan["baseline"]]
    lines = [f"# {' and '.join(others)} against {plan['baseline']}", ""]
    lines += [f"- {sentence(study, name)}" for name in others]
    lines += [
        "",
        f"Named before the runs: {METRICS[plan['metric']]}; differences up to ±{plan['margin']:g} count as none; "
        f"seeds {', '.join(map(str, plan['seeds']))}; {plan['labels'][-1]} labels.",
        "",
        f"| strategy | {METRICS[plan['metric']]} | difference | interval | p, Holm | verdict |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, curve in study["curves"].items():
        metric = curve["area"]["mean"] if plan["metric"] == "area" else curve["accuracy"]["mean"][-1]
        found = study["differences"].get(name)
        cells = ["", "", "", "baseline" if name == plan["baseline"] else "not compared"]
        if found:
            interval = "–" if found["low"] is None else f"{found['low']:+.3f} to {found['high']:+.3f}"
            p = "–" if found["p_holm"] is None else f"{found['p_holm']:.2g}"
            cells = [f"{found['mean']:+.3f}", interval, p, said(found["verdict"], plan["margin"])]
        lines.append(f"| {name} | {metric:.3f} | {' | '.join(cells)} |")
    lines += [
        "",
        f"| strategy | labels to {plan['baseline']}'s final accuracy | s a label | FLOPs a label, selection | training "
        "| selection pays, a label |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, cost in study["costs"].items():
        cells = [
            needed_in_words(study["labels_needed"].get(name)),
            f"{cost['seconds_a_label']:.3g}",
            flops_in_words(cost["selection_flops_a_label"]),
            flops_in_words(cost["training_flops_a_label"]),
            pays_in_words(cost),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if failed := [run for run in study["runs"] if run["state"] == "failed"]:
        lines += ["", f"{len(failed)} of {len(study['runs'])} runs failed, and are in no figure:", ""]
        for run in failed:
            error = " ".join(run["error"].replace("|", "\\|").split())
            lines.append(f"- {run['strategy']}, seed {run['seed']}, in round {run['failed_in_round']}: `{error}`")
    return "\n".join(lines) + "\n"
