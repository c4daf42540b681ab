"""All figures of a comparison, from the folders of its runs: what `comparison.json` holds."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from activedpo_jax import __version__
from activedpo_jax.config import default
from activedpo_jax.files import flatten, plain, read_json
from activedpo_jax.record import comparison, costs, failures, folders, outcomes, picks
from activedpo_jax.record.folders import RunSummary
from activedpo_jax.record.statistics import hierarchical_bootstrap, holm, verdict

ALPHA = 1 - comparison.CONFIDENCE
_EXAMPLES = 3  # picks of each strategy that are shown whole


class Run(NamedTuple):
    """One strategy on one seed, as its folder has it."""

    strategy: str
    seed: int
    folder: pathlib.Path
    summary: RunSummary  # of the rounds that are done
    failure: failures.Failure | None
    is_done: bool  # and not failed

    @property
    def state(self) -> str:
        """In words."""
        return "failed" if self.failure else "done" if self.is_done else "not done"


def read_run(config: ml_collections.ConfigDict, folder: pathlib.Path, strategy: str, seed: int) -> Run:
    """What there is of a run in the work directory `folder`."""
    place = folders.run_folder(folder, config, strategy, seed)
    path, failure = place / "summary.json", failures.read_failure(place)
    summary: Any = read_json(path) if path.exists() else {"strategy": strategy, "seed": seed, "rounds": []}
    last = place / ("merged/config.json" if config.export.merged else "adapter/adapter_config.json")
    done = len(summary["rounds"]) == config.rounds + 1 and last.exists()
    return Run(strategy, seed, place, summary, failure, done and failure is None)


def weights(metric: str, labels: Sequence[float]) -> np.ndarray:
    """What each evaluation counts in the metric: [T + 1], of which the sum is 1."""
    found = np.zeros(len(labels))
    if metric == "final":
        found[-1] = 1
        return found
    widths = np.diff(np.asarray(labels, float))  # trapezoids; see `comparison.area`
    found[:-1] += widths / 2
    found[1:] += widths / 2
    return found / widths.sum()


def make(config: ml_collections.ConfigDict, folder: pathlib.Path, everything: Sequence[Run]) -> dict[str, Any]:
    """The comparison.

    Args:
      everything: all runs, also those that failed.

    Returns:
      What JSON can hold.  `plan`: what was named before the runs.  `runs`: of each its state and figures.  `curves`,
      `labels_needed`: see `comparison.compare`.  `differences`: per strategy but the baseline, see `_differences`.
      `costs`, `picks`: see `_costs` and `_picks`; empty where no run is done.

    Raises:
      ValueError: a file of a run is damaged; or see `comparison.learning_curves`.
    """
    done = [run for run in everything if run.is_done]
    options = config.compare
    found: dict[str, Any] = {
        "version": __version__,
        "plan": {
            "metric": options.metric,
            "margin": options.margin,
            "baseline": options.baseline,
            "alpha": ALPHA,
            "replicates": options.replicates,
            "strategies": list(config.strategies),
            "seeds": list(config.seeds),
            "labels": [number * config.labels_per_round for number in range(config.rounds + 1)],
        },
        "recipe": _recipe(config),
        "options": config.to_dict(),
        "runs": [_run(options.metric, run) for run in everything],
        "curves": {},
        "labels_needed": {},
        "differences": {},
        "costs": {},
        "picks": {},
    }
    if done:
        curves = comparison.compare([run.summary for run in done], options.baseline)
        found |= {"curves": curves["strategies"], "labels_needed": curves["labels_needed"]}
        found["differences"] = _differences(config, done)
        found["costs"] = _costs(config, folder, done, curves["labels_needed"])
        found["picks"] = _picks(config, done)
    return dict(plain(found))


def _recipe(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The options that are not as by default, but for those that say what is compared."""
    usual = flatten(default())
    return {
        name: value
        for name, value in flatten(config).items()
        if value != usual[name] and name not in ("strategies", "seeds") and not name.startswith("compare.")
    }


def _run(metric: str, run: Run) -> dict[str, Any]:
    rounds = run.summary["rounds"]
    entry: dict[str, Any] = {
        "strategy": run.strategy,
        "seed": run.seed,
        "state": run.state,
        "rounds": max(0, len(rounds) - 1),
        "accuracy": rounds[-1]["accuracy"] if rounds else None,
        "metric": None,
    }
    if run.is_done:
        accuracy = [entry["accuracy"] for entry in rounds]
        entry["metric"] = float(weights(metric, [entry["labels"] for entry in rounds]) @ accuracy)
    if run.failure:
        entry |= {"error": run.failure.error, "failed_in_round": run.failure.round}
    return entry


def _differences(config: ml_collections.ConfigDict, done: Sequence[Run]) -> dict[str, Any]:
    """Of the metric, strategy less baseline.

    Returns:
      per strategy that shares a seed with the baseline: `seeds`, `per_seed`; `mean`, `low`, `high` (1 − α),
      `low_equivalence`, `high_equivalence` (1 − 2α, which lies within the margin where two one-sided tests say so);
      `p_value`, `p_holm`; `equivalence_p_holm`; `verdict`, of `statistics.verdict`.
    """
    options = config.compare
    runs = {(run.strategy, run.seed): run for run in done}
    estimates: dict[str, Any] = {}
    for strategy in config.strategies:
        seeds = [s for s in config.seeds if {(strategy, s), (options.baseline, s)} <= runs.keys()]
        if strategy == options.baseline or not seeds:
            continue
        differences, prompts = [], []
        for seed in seeds:
            ours, theirs = (outcomes.read(runs[name, seed].folder) for name in (strategy, options.baseline))
            shares = weights(options.metric, [e["labels"] for e in runs[strategy, seed].summary["rounds"]])
            if not np.array_equal(ours.prompts, theirs.prompts):
                raise ValueError(f"{runs[strategy, seed].folder}: heldout.npz is of other pairs than the baseline's")
            differences.append(shares @ (ours.correct - theirs.correct))
            prompts.append(ours.prompts)
        estimates[strategy] = (seeds, differences, hierarchical_bootstrap(differences, prompts, options.replicates))
    p_values = [estimate.p_value() for _, _, estimate in estimates.values()]
    equivalences = [estimate.equivalence_p(options.margin) for _, _, estimate in estimates.values()]
    found = {}
    for (strategy, (seeds, differences, estimate)), p, adjusted, equivalence in zip(
        estimates.items(), p_values, holm(p_values), holm(equivalences), strict=True
    ):
        low, high = estimate.interval(1 - ALPHA)
        low_equivalence, high_equivalence = estimate.interval(1 - 2 * ALPHA)
        found[strategy] = {
            "seeds": seeds,
            "per_seed": [float(of_seed.mean()) for of_seed in differences],
            "mean": estimate.mean,
            "low": low,
            "high": high,
            "low_equivalence": low_equivalence,
            "high_equivalence": high_equivalence,
            "p_value": p,
            "p_holm": adjusted,
            "equivalence_p_holm": equivalence,
            "verdict": verdict(estimate.mean, adjusted, equivalence, ALPHA),
        }
    return found


def _costs(
    config: ml_collections.ConfigDict, folder: pathlib.Path, done: Sequence[Run], needed: Mapping[str, Any]
) -> dict[str, Any]:
    """Per strategy: `seconds_a_label`, `selection_flops_a_label` (None: not known) and `training_flops_a_label`, means;
    but for the baseline `break_even`, see `costs.break_even`."""
    of_rounds = {
        strategy: costs.seconds_by_round([run.summary for run in done if run.strategy == strategy])
        for strategy in config.strategies
        if any(run.strategy == strategy for run in done)
    }
    baseline, labels = config.compare.baseline, np.arange(config.rounds + 1.0) * config.labels_per_round
    found: dict[str, Any] = {}
    for strategy, seconds in of_rounds.items():
        selection, training = [], []
        for run in done:
            if run.strategy == strategy:
                sizes, picked = costs.read_sizes(folder, run.seed), picks.read_picks(run.folder, config.rounds)
                tokens = [(sum(p.prompt_tokens for p in some), sum(p.response_tokens for p in some)) for some in picked]
                selection.append(costs.selection_flops(config, strategy, sizes))
                training.append(costs.training_flops(config, sizes, tokens))
        known = [flops for flops in selection if flops is not None]
        found[strategy] = {
            "seconds_a_label": float(seconds.sum() / labels[-1]),
            "selection_flops_a_label": float(np.mean(known) / labels[-1]) if known else None,
            "training_flops_a_label": float(np.mean(training) / labels[-1]),
        }
        if strategy in needed and needed[strategy]["status"] != "no gain":
            until = needed[strategy]["labels"]
            found[strategy]["break_even"] = costs.break_even(
                seconds, of_rounds[baseline], labels, until, config.compare.hour_price
            )
    return found


def _picks(config: ml_collections.ConfigDict, done: Sequence[Run]) -> dict[str, Any]:
    """What strategies picked.

    Returns:
      `lengths`: per strategy, tokens of a picked response by round.  `repetition`: per strategy, by round, the mean
      cosine of a pick to the nearest pair labelled before it.  `clusters`: `names`, and per strategy the `shares` of
      its picks.  `agreement`: per two strategies, see `picks.Agreement`.  `examples`: per strategy, of its first seed's
      last round.
    """
    runs: dict[str, dict[int, picks.Rounds]] = {}
    for run in done:
        runs.setdefault(run.strategy, {})[run.seed] = picks.read_picks(run.folder, config.rounds)
    names = list(runs)
    flat = [(name, pick) for name in names for rounds in runs[name].values() for some in rounds for pick in some]
    labels, words = picks.clusters([pick.prompt for _, pick in flat])
    shares = {}
    for name in names:
        own = labels[[i for i, (strategy, _) in enumerate(flat) if strategy == name]]
        shares[name] = (np.bincount(own, minlength=len(words)) / len(own)).tolist()
    repetition, examples = {}, {}
    for name in names:
        nearest = [_nearest(rounds) for rounds in runs[name].values()]
        repetition[name] = np.mean(
            [np.reshape(similarity, (config.rounds, -1)).mean(1) for similarity, _ in nearest], 0
        )
        examples[name] = _examples(next(iter(runs[name].values())), *nearest[0])
    agreements = []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if agreed := picks.agreement(runs[one], runs[other]):
                agreements.append({"strategies": [one, other], **agreed._asdict()})
    return {
        "lengths": {name: picks.mean_lengths(list(runs[name].values())) for name in names},
        "repetition": repetition,
        "clusters": {"names": words, "shares": shares},
        "agreement": agreements,
        "examples": examples,
    }


def _nearest(rounds: picks.Rounds) -> tuple[np.ndarray, np.ndarray]:
    found, _ = picks.vectors([pick.text for some in rounds for pick in some])
    return picks.nearest_before(found)


def _examples(rounds: picks.Rounds, similarity: np.ndarray, rows: np.ndarray) -> list[dict[str, Any]]:
    flat = [pick for some in rounds for pick in some]
    first = len(flat) - len(rounds[-1])
    return [
        {
            "round": len(rounds),
            **{name: getattr(flat[i], name) for name in ("prompt", "first", "second", "preference", "score")},
            "nearest": flat[rows[i]].text if rows[i] >= 0 else None,
            "similarity": float(similarity[i]),
        }
        for i in range(first, min(first + _EXAMPLES, len(flat)))
    ]
