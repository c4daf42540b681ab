"""Oracles: who says which response of a pair is better."""
