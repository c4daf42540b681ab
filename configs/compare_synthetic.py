"""Three strategies on five paired seeds of the procedural task, and a report that says whether they differ.

    python -m activedpo_jax.compare --config configs/compare_synthetic.py --workdir runs/compare

Task, recipe and seeds are the quickstart's.  The primary metric is the area under the curve of held-out accuracy, and
differences up to 0.02 count as none.
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
