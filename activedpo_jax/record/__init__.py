"""The record of a run: its work directory, labels, checkpoints, metrics, and what a person reads."""
