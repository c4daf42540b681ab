"""ActiveDPO, round after round.

    python -m activedpo_jax.main --config configs/quickstart.py --workdir runs/quickstart [--config.dpo.beta=0.2]

The same command on the same work directory resumes.  With `--compile_only=v5e:4x4` it compiles the programs of the run
for that topology, prints what they need and whether they fit, and stops; see `compile_only`.
"""

if __name__ == "__main__":  # first, since the imports take seconds
    from activedpo_jax import cluster, errors

    cluster.guard()
    errors.end_at_signals()

import os
import pathlib
import sys
from collections.abc import Sequence

import ml_collections
from jax.sharding import Mesh

from activedpo_jax import cluster, compile_only, errors, files, flags, hosts, layout, runs, tasks
from activedpo_jax.oracles.labels import Pending
from activedpo_jax.record import comparison, folders, report
from activedpo_jax.selection.strategies import STRATEGIES


def main(argv: Sequence[str] | None = None) -> None:
    command = flags.read_config(sys.argv if argv is None else argv, STRATEGIES)
    config, folder = command.config, command.workdir
    with errors.clean_errors():
        if command.compile_only:
            compile_only.compile_for(config, command.compile_only, folder)
            return
        assert folder is not None
        hosts.start(command.address, cluster.detected(sys.argv[1:], os.environ))
        mesh = layout.make_mesh(config.mesh)
        compete(config, folder, mesh, runs.begin(config, folder, mesh, "main"))


def compete(config: ml_collections.ConfigDict, folder: pathlib.Path, mesh: Mesh, first: tasks.Task) -> None:
    """Every strategy on every seed, and their comparison."""
    summaries, pending = [], []
    for seed in config.seeds:
        task = first if seed == config.seeds[0] else tasks.load(config, seed, mesh, folder, hosts.readers())
        setting = runs.prepare(config, task, mesh, seed, folder)
        for strategy in config.strategies:
            place = folders.run_folder(folder, config, strategy, seed)
            outcome = runs.run(setting, strategy, place)
            if isinstance(outcome, Pending):
                pending.append(f"{strategy}, seed {seed}, {outcome.message}")
                print(pending[-1], flush=True)
            else:
                summaries.append(outcome)
    if not pending:
        finish(folder, summaries)


def finish(folder: pathlib.Path, summaries: Sequence[folders.RunSummary]) -> None:
    """The table and the picture of all runs; of several runs their comparison in `summary.json`, too."""
    hosts.on_first(files.remove_folder)(folder / "heldout")
    if len(summaries) > 1:
        folders.write_summary(folder, {**comparison.compare(summaries), "runs": list(summaries)})
    hosts.on_first(report.plot_curves)(summaries, folder / "curves.png", folder.resolve().name)
    print(f"\n{report.final_table(summaries)}\n\n{folder / 'curves.png'}")


if __name__ == "__main__":
    main()
