"""Strategies against a baseline, over paired seeds, under one recipe; and a report that says whether they differ.

    python -m activedpo_jax.compare --config configs/compare_synthetic.py --workdir runs/compare

Every strategy runs on every seed.  Runs of one seed share the pool and its order, the held-out pairs, the weights that
they start from, π_ref, the seed of everything drawn, and all options.  `compare.metric`, `compare.margin` and
`compare.baseline` are fixed when the work directory begins, before any run, and stand in the report.

The same command resumes, run by run and within a run.  A run that fails is recorded with its error, the others go on,
and the report shows it; `--config.compare.retry` tries it again.  Beside what `main` writes:

    DIR/report.html                   everything, in one file
    DIR/comparison.{json,csv,md}      the figures; a row for every round of every run; the report in short
    DIR/curves.png
    DIR/<strategy>/seed<seed>/failed.json
"""

if __name__ == "__main__":  # first, since the imports take seconds
    from activedpo_jax import errors

    errors.end_at_signals()

import pathlib
import sys
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from activedpo_jax import errors, files, flags, layout, runs, tasks
from activedpo_jax.data.ragged import lengths_of
from activedpo_jax.oracles.labels import Pending
from activedpo_jax.record import costs, failures, folders, page, report, study, study_files
from activedpo_jax.selection.strategies import STRATEGIES


def main(argv: Sequence[str] | None = None) -> None:
    config, folder, _ = flags.read_plain_run(sys.argv if argv is None else argv, STRATEGIES)
    with errors.clean_errors():
        mesh = layout.make_mesh(config.mesh)
        pending = compete(config, folder, mesh, runs.begin(config, folder, mesh, "compare"))
        if not pending:
            write(config, folder)


def compete(config: ml_collections.ConfigDict, folder: pathlib.Path, mesh: Mesh, first: tasks.Task) -> bool:
    """Every strategy on every seed that is not done; whether people have to answer first."""
    pending = False
    for seed in config.seeds:
        left = [strategy for strategy in config.strategies if is_left(config, folder, strategy, seed)]
        if not left:
            continue
        task = first if seed == config.seeds[0] else tasks.load(config, seed, mesh, folder)
        setting = runs.prepare(config, task, mesh, seed, folder)
        costs.write_sizes(folder, seed, sizes_of(setting.task))
        for strategy in left:
            outcome = attempt(setting, strategy, folders.run_folder(folder, config, strategy, seed))
            if isinstance(outcome, failures.Failure):
                print(f"{strategy}, seed {seed}, failed in round {outcome.round}: {outcome.error}", flush=True)
            elif isinstance(outcome, Pending):
                pending = True
                print(f"{strategy}, seed {seed}, {outcome.message}", flush=True)
    return pending


def sizes_of(task: tasks.Task) -> costs.Sizes:
    """What a pass over the pool goes through."""
    config = task.decoder.config
    layers = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(task.params_shape["layers"]))
    head = config.vocab_size * config.hidden_size
    if task.pool is None or task.prompts is not None:
        return costs.Sizes(layers, head, 0, 0, 0)
    responses = sum(int(lengths_of(several).sum()) for several in task.pool.response_tokens)
    return costs.Sizes(layers, head, int(lengths_of(task.pool.prompt_tokens).sum()), responses, task.pool.num_pairs)


def is_left(config: ml_collections.ConfigDict, folder: pathlib.Path, strategy: str, seed: int) -> bool:
    """Whether a run is to be made, or made further."""
    run = study.read_run(config, folder, strategy, seed)
    return config.compare.retry if run.failure else not run.is_done


def attempt(
    setting: runs.Setting, strategy: str, folder: pathlib.Path
) -> folders.RunSummary | Pending | failures.Failure:
    """A run, or how it failed."""
    failures.forget_failure(folder)
    try:
        return runs.run(setting, strategy, folder)
    except Exception as error:  # of many kinds: oracles and strategies may be anybody's
        line = errors.of_a_run(error)
        if line is None:
            raise
        return failures.write_failure(folder, line, error)


def write(config: ml_collections.ConfigDict, folder: pathlib.Path) -> None:
    """The report in all its forms."""
    files.remove_folder(folder / "heldout")
    everything = [
        study.read_run(config, folder, strategy, seed) for strategy in config.strategies for seed in config.seeds
    ]
    found = study.make(config, folder, everything)
    files.write_json(folder / "comparison.json", found)
    files.write_atomic(folder / "comparison.csv", study_files.csv_of(everything))
    markdown = study_files.markdown_of(found)
    files.write_atomic(folder / "comparison.md", markdown)
    done = [run.summary for run in everything if run.is_done]
    if done:
        report.plot_curves(done, folder / "curves.png", folder.resolve().name)
    files.write_atomic(folder / "report.html", page.html_of(found, folder.resolve().name))
    print(f"\n{markdown}\n{folder / 'report.html'}")


if __name__ == "__main__":
    main()
