"""An example of a reward function: how positive a text sounds, by its words.

    --config.oracle.kind=function --config.oracle.function=activedpo_jax.oracles.sentiment:positivity

A word list, not a judge: it shows how an oracle is written, and gives a reward that needs no model.
"""

import re
from collections.abc import Sequence
from typing import Any

_POSITIVE = """
amazing awesome beautiful best better brilliant charming cheerful clear comfortable confident delicious delight
delightful easy effective elegant engaging enjoy enjoyable enjoyed excellent exciting fantastic favorite fine free
friendly fun gentle glad good grateful great happily happiness happy healthy helpful hope impressive improve
incredible inspiring interesting joy kind love loved lovely lucky nice outstanding perfect pleasant pleased pleasure
positive powerful proud recommend relaxing rich safe satisfied smart special strong succeed success successful superb
sweet thank thanks thrilled useful valuable vibrant warm welcome well wonderful worth
"""
_NEGATIVE = """
afraid angry annoying anxious awful bad boring broken cannot confusing cruel damage danger dangerous dead death
difficult dirty disappointed disappointing disaster dull evil fail failed failure fear hard harm harmful hate hated
horrible hurt impossible inadequate lack lazy lonely lose loss lost mess mistake nasty negative never pain painful
poor problem problems risk sad scared severe sick slow sorry stupid suffer terrible tired trouble ugly unable
unfortunately unhappy upset useless waste weak worried worse worst wrong
"""


def positivity(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    """(positive − negative words) / √words of each completion; the prompts do not matter."""
    positive, negative, scores = set(_POSITIVE.split()), set(_NEGATIVE.split()), []
    for text in completions:
        words = re.findall(r"[a-z']+", text.lower())
        balance = sum(word in positive for word in words) - sum(word in negative for word in words)
        scores.append(balance / max(len(words), 1) ** 0.5)
    return scores
