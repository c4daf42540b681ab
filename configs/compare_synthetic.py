"""Three strategies on five paired seeds of the procedural task, and a report that says whether they differ.

    python -m activedpo_jax.compare --config configs/compare_synthetic.py --workdir runs/compare

Task, recipe and seeds are the quickstart's.  The primary metric is the area under the curve of held-out accuracy, and
differences up to 0.02 count as none.

Three minutes on two cores of an AMD EPYC, 15 runs.  Expected result: `activedpo` is better than `random` by 0.117 (95%
interval 0.057 to 0.177, p = 0.011 after Holm); of `activedpo_topk`, which ranks once a round, it is not decided (0.053,
-0.013 to 0.120).  On the first three of the seeds nothing is decided.
"""

import ml_collections

from configs import quickstart


def get_config() -> ml_collections.ConfigDict:
    config = quickstart.get_config()
    config.strategies = ("activedpo", "activedpo_topk", "random")
    config.compare.metric = "area"
    config.compare.margin = 0.02
    config.compare.baseline = "random"
    return config
