"""Evaluation: log-probabilities of pools, and held-out figures."""
