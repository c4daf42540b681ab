"""`activedpo_fisher`: `activedpo` with every φφᵀ weighted by p(1−p), the Fisher information of Bradley–Terry.

A pair whose answer the implicit reward foresees, p near 0 or 1, says little, however new its φ is.  That is D-optimal
design for logistic regression at the current estimate.
"""

from activedpo_jax.selection.strategies.d_optimal import d_optimal

STRATEGY = d_optimal("activedpo_fisher", "fisher_features")
