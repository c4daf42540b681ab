"""A pair about which there can be no two opinions, to try models and servers with."""

from activedpo_jax.oracles.labels import Question

PROMPT = "What is the capital of France?"
GOOD = "The capital of France is Paris."
BAD = "Bananas are a kind of berry, and I will not say anything about France."

QUESTION = Question(pair_id="", prompt=PROMPT, first=GOOD, second=BAD, score=None, round=0)
