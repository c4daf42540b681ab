"""A reward model as an oracle: it gives each response one number, and the pair's larger one is preferred.

The model is a Hugging Face sequence classifier, in this process (`local_reward_model`) or behind vLLM (here).  Before
it is asked anything, it is tried on a known pair: what gives several numbers, probabilities instead of logits, or the
wrong order is refused, since its labels would look like any others.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from activedpo_jax.oracles import known
from activedpo_jax.oracles.client import Client, Refused, Server, concurrently
from activedpo_jax.oracles.labels import Label, Question
from activedpo_jax.oracles.noise import Noise
from activedpo_jax.progress import progress

_SATURATED = 1e-3  # probabilities this near to 0 or 1 tell responses apart no longer


class Text(NamedTuple):
    """A response, and what it answers."""

    prompt: str | Sequence[Any]  # text, or chat messages
    response: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation that ends in the response."""
        before = [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else list(self.prompt)
        return [*before, {"role": "assistant", "content": self.response}]


Numbers = list[float] | str  # what a model gives a text; or why it gives nothing


class Model(Protocol):
    """What gives numbers to texts, in whatever form; a reward model gives one to each."""

    name: str

    def prepare(self) -> None:
        """Raises ValueError or StoreError if the model cannot be had."""
        ...

    def numbers(self, texts: Sequence[Text]) -> list[Numbers]: ...


class RewardModelOracle:
    """Prefers the response that the model rewards more; of equal rewards it says `tie`.

    Args:
      max_failed: share of a round's pairs without a reward, above which the run ends.
    """

    answers_per_pair = 1
    asks_whole_rounds = False

    def __init__(self, model: Model, max_failed: float, noise: Noise) -> None:
        self._model, self._max_failed, self._noise = model, max_failed, noise

    def check(self) -> None:
        """Tries the model on a known pair.

        Raises:
          ValueError: it cannot be had, or is no reward model; says what to change.
          StoreError: its server cannot be reached, or fails.
        """
        self._model.prepare()
        good, bad = known_rewards(self._model)
        name = self._model.name
        if good == bad:
            raise ValueError(f"{name}: rewards {known.GOOD!r} and {known.BAD!r} alike, with {good:g}; {_expected()}")
        if all(min(abs(x), abs(x - 1)) < _SATURATED for x in (good, bad)):
            raise ValueError(
                f"{name}: rewards a good and a bad answer with {good:g} and {bad:g}, which look like probabilities "
                "that are saturated; expected logits, which tell good answers from better ones: have the server apply "
                "no activation (vLLM: --pooler-config '{\"use_activation\": false}'), or take another model"
            )
        if good < bad:
            raise ValueError(f"{name}: rewards {known.BAD!r} with {bad:g}, {known.GOOD!r} with {good:g}; {_expected()}")

    def ask(self, questions: Sequence[Question]) -> list[Label]:
        """The answers, in the order of the questions.

        Raises:
          ValueError: a reward is not one finite number, or too many pairs have none.
          StoreError: the model's server cannot be reached, or fails.
        """
        texts = [Text(q.prompt, response) for q in questions for response in (q.first, q.second)]
        found = self._model.numbers(texts)
        name, rewards, problems = self._model.name, np.full((len(questions), 2), np.nan), list[str]()
        for i, question in enumerate(questions):
            pair = found[2 * i : 2 * i + 2]
            if why := [numbers for numbers in pair if isinstance(numbers, str)]:
                problems.append(f"pair {question.pair_id!r} {why[0]}")
                continue
            rewards[i] = [_only(name, numbers, f"pair {question.pair_id!r}") for numbers in pair]
        known_rows = np.isfinite(rewards).all(1)
        if problems:
            what = f"{name}: {len(problems)} of {len(questions)} pairs have no reward; {problems[0]}"
            if len(problems) > self._max_failed * len(questions):
                raise ValueError(
                    f"{what}; expected at most config.oracle.max_failed={self._max_failed:g} of them: set it higher, "
                    "or take another model"
                )
            print(f"{what}: skipped")
        answered = [q for q, is_known in zip(questions, known_rows, strict=True) if is_known]
        margins = np.diff(rewards[known_rows], axis=1)[:, 0]
        labels = {label.pair_id: label for label in self._noise.on_margins(answered, margins, name)}
        return [labels.get(q.pair_id, Label(q.pair_id, "skip", name)) for q in questions]


def known_rewards(model: Model) -> tuple[float, float]:
    """The rewards of a good and a bad answer.

    Raises:
      ValueError: one is not a finite number.
    """
    texts = [Text(known.PROMPT, response) for response in (known.GOOD, known.BAD)]
    good, bad = (_only(model.name, numbers, f"{known.PROMPT!r}") for numbers in model.numbers(texts))
    return good, bad


def _only(name: str, numbers: Numbers, where: str) -> float:
    """The one number.

    Raises:
      ValueError: there is another count of them, or it is not finite.
    """
    if isinstance(numbers, str):
        raise ValueError(f"{name}: {where} {numbers}; {_expected()}")
    if len(numbers) != 1:
        raise ValueError(
            f"{name}: gives {len(numbers)} numbers to a response, not one: it classifies, embeds, or rewards each "
            "token; expected a reward model with num_labels=1, behind vLLM at /classify"
        )
    if not math.isfinite(numbers[0]):
        raise ValueError(f"{name}: {where}: rewards a response with {numbers[0]}; expected a finite number")
    return numbers[0]


def _expected() -> str:
    return (
        "expected a reward model, which rewards the better answer more: set config.oracle.path, or config.oracle.url "
        "and config.oracle.model; what rewards something else can be asked by config.oracle.kind=function"
    )


# The fields of a request that ask for the logit; vLLM has renamed it, and ignores what it does not know.
_ACTIVATIONS = ("use_activation", "activation")


class RemoteModel:
    """A model behind vLLM's `/classify` or `/pooling`, to which chat messages are sent: its server writes them by the
    model's chat template.

    A request holds one response, so that one that is too long spoils no others.  vLLM puts an activation (of one number
    a sigmoid) on what a classifier says unless it is asked not to.
    """

    def __init__(self, server: Server, model: str) -> None:
        self.name = f"reward model {model}"
        self._client, self._model = Client(server), model
        self._request = {_ACTIVATIONS[0]: False}

    def prepare(self) -> None:
        """Finds out how to ask for logits.

        Numbers between 0 and 1 may be logits, too; those that are the same with and without an activation are not.

        Raises:
          ValueError, StoreError: as of `Client`; or the server applies its activation whatever it is asked.
        """
        self._client.check_key()
        for field in _ACTIVATIONS:
            self._request = {field: True}
            activated = known_rewards(self)
            self._request = {field: False}
            plain = known_rewards(self)
            if plain != activated or not all(0 <= reward <= 1 for reward in plain):
                return
        raise ValueError(
            f"{self.name}: {self._client.server.url} gives {plain[0]:g} and {plain[1]:g} with an activation and "
            "without, which look like probabilities; expected logits: start vLLM with --pooler-config "
            "'{\"use_activation\": false}'"
        )

    def numbers(self, texts: Sequence[Text]) -> list[Numbers]:
        """What the server gives each text, in their order."""
        found: dict[int, Numbers] = {}
        with progress(total=len(texts), desc="rewarding", unit="response") as bar:
            for i, numbers in concurrently(
                lambda i: self._ask(texts[i]), range(len(texts)), self._client.server.concurrency
            ):
                found[i] = numbers
                bar.update()
        return [found[i] for i in range(len(texts))]

    def _ask(self, text: Text) -> Numbers:
        try:
            reply = self._client.post({"model": self._model, "messages": text.messages, **self._request}).content
        except Refused as refused:
            return f"is refused by the server ({refused})"
        try:
            (entry,) = reply["data"]
            # `/classify` has probs, whether they are probabilities or not, `/pooling` has data.
            return list(map(float, np.ravel(entry["probs"] if "probs" in entry else entry["data"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self._client.server.url}: answers {str(reply)[:200]}; expected what vLLM's /classify or /pooling "
                "does: check config.oracle.url"
            ) from error
