"""ActiveDPO (arXiv 2505.19241) in JAX: the model being aligned chooses the preference labels it needs."""

__version__ = "0.1.0"
