"""A procedural preference task with a known reward and a heavy-tailed pool, for the quickstart and the tests.

A prompt names one of many *families* (what a product's users ask for); a response is written on the family's few
*topics*, mostly in one of a few *styles*, each word being a topic in a style; and each family likes each style to its
own degree:

    reward(family, response) = liking[family, majority style] + ¼ · share of the majority style

which no function linear in the tokens can express.  A few families are very common in the pool and most are rare
(Zipf), but the held-out set has equally many pairs of each, since a product is judged by all of its users.  Labelling
pairs at random spends most labels on families that have long been understood.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax.data.groups import Bucket, Groups, PairPool, group_pairs

_BOS, _EOS, _FIRST_FAMILY = 0, 1, 2
STOP = (_EOS,)


@dataclasses.dataclass(frozen=True)
class SyntheticTask:
    """Sizes of the task; everything else is drawn from the seed."""

    families: int
    styles: int
    topics: int
    topics_per_family: int
    context_words: int  # random words of a prompt besides its family
    min_response: int  # words
    max_response: int
    purity: float  # share of a response's words that come from its style
    zipf: float  # probability of the k-th family ∝ k^−zipf

    @property
    def vocab_size(self) -> int:
        return _FIRST_FAMILY + self.families + self.styles * self.topics

    @property
    def bucket(self) -> Bucket:
        return Bucket(prompt=2 + self.context_words, response=self.max_response + 1)

    def reward(self, family: int, words: np.ndarray, likings: np.ndarray) -> float:
        """The known reward of a response's words (token ids, without EOS) under likings [families, styles]."""
        counts = np.bincount(self._style(words), minlength=self.styles)
        major = int(counts.argmax())
        return float(likings[family, major] + 0.25 * counts[major] / len(words))

    def _style(self, words: np.ndarray) -> np.ndarray:
        return (words - _FIRST_FAMILY - self.families) // self.topics

    def word(self, token: int) -> str:
        """How a token is shown to a person."""
        if token < _FIRST_FAMILY:
            return ("<bos>", "<eos>")[token]
        if token < _FIRST_FAMILY + self.families:
            return f"family{token - _FIRST_FAMILY}"
        style, topic = divmod(token - _FIRST_FAMILY - self.families, self.topics)
        return f"{chr(ord('a') + style)}{topic}"

    def likings(self, seed: int) -> np.ndarray:
        """[families, styles] float64: each family ranks the styles in an order of its own."""
        rng = np.random.default_rng([seed, 0])
        return np.stack([rng.permutation(self.styles) for _ in range(self.families)]).astype(float)

    def family_topics(self, seed: int) -> np.ndarray:
        """[families, topics_per_family] int: what each family is about."""
        rng = np.random.default_rng([seed, 3])
        return np.stack([rng.choice(self.topics, self.topics_per_family, replace=False) for _ in range(self.families)])

    def pool(self, seed: int, num_prompts: int, responses: int = 2) -> PairPool:
        """Prompts of Zipf-distributed families, and all pairs of their responses."""
        rng = np.random.default_rng([seed, 1])
        p = np.arange(1, self.families + 1, dtype=float) ** -self.zipf
        return self._pairs(rng, rng.choice(self.families, num_prompts, p=p / p.sum()), seed, "pool", responses)

    def heldout(self, seed: int, num_pairs: int) -> PairPool:
        """Pairs spread evenly over the families."""
        rng = np.random.default_rng([seed, 2])
        return self._pairs(rng, np.arange(num_pairs) % self.families, seed, "heldout")

    def language(self, seed: int, num_pairs: int) -> PairPool:
        """Texts to train a base model on: all families and styles equally often, without preferences."""
        rng = np.random.default_rng([seed, 4])
        pool = self._pairs(rng, np.arange(num_pairs) % self.families, seed, "language")
        return dataclasses.replace(pool, preferences=np.full(num_pairs, -1, np.int8), rewards=None)

    def _pairs(
        self, rng: np.random.Generator, families: np.ndarray, seed: int, name: str, responses_each: int = 2
    ) -> PairPool:
        """A prompt for each of the families, with as many responses, each in another style."""
        likings, family_topics = self.likings(seed), self.family_topics(seed)
        first_word = _FIRST_FAMILY + self.families
        prompts, responses, rewards = [], [], []
        for family in families:
            context = rng.integers(first_word, self.vocab_size, self.context_words)
            prompts.append(np.array([_BOS, *context, _FIRST_FAMILY + family], np.int32))
            styles = rng.choice(self.styles, responses_each, replace=False)
            words = [self._write(rng, style, family_topics[family]) for style in styles]
            rewards.append([self.reward(family, w, likings) for w in words])
            responses.append([np.append(w, _EOS).astype(np.int32) for w in words])
        among = group_pairs(responses_each)
        pairs = np.array([[group, *pair] for group in range(len(families)) for pair in among], np.int32)
        scores = np.array(rewards, np.float32)[pairs[:, :1], pairs[:, 1:]]
        return PairPool(
            prompt_tokens=prompts,
            response_tokens=responses,
            pairs=pairs,
            pair_ids=[f"{name}-{i:05d}" for i in range(len(pairs))],
            preferences=(scores[:, 1] > scores[:, 0]).astype(np.int8),
            rewards=scores,
            prompt_texts=[" ".join(map(self.word, p[1:])) for p in prompts],
            response_texts=[[" ".join(map(self.word, r[:-1])) for r in rs] for rs in responses],
        )

    def _write(self, rng: np.random.Generator, style: int, topics: np.ndarray) -> np.ndarray:
        """Words of one response on these topics, the majority of them in `style`."""
        while True:
            length = rng.integers(self.min_response, self.max_response + 1)
            styles = np.where(rng.random(length) < self.purity, style, rng.integers(0, self.styles, length))
            counts = np.bincount(styles, minlength=self.styles)
            if np.sum(counts == counts.max()) == 1 and counts.argmax() == style:
                return _FIRST_FAMILY + self.families + styles * self.topics + rng.choice(topics, length)


@dataclasses.dataclass(frozen=True)
class SyntheticReward:
    """The known reward as a traceable function of tokens; a `jax.tree_util.Partial` of it with the likings as
    first argument is an oracle (`oracles.reward`)."""

    task: SyntheticTask

    def __call__(self, likings: jax.Array, groups: Groups) -> jax.Array:
        """[G, m] float32; −1 for a response without words."""
        task = self.task
        first_word = _FIRST_FAMILY + task.families
        ids, lengths = jnp.asarray(groups.response_ids), jnp.asarray(groups.response_len)
        is_word = (jnp.arange(ids.shape[-1]) < lengths[..., None]) & (ids >= first_word)
        styles = jnp.where(is_word, (ids - first_word) // task.topics, -1)
        counts = jnp.sum(styles[..., None] == jnp.arange(task.styles), axis=-2)  # [G, m, styles]
        major, words = jnp.argmax(counts, axis=-1), jnp.sum(is_word, axis=-1)
        family = jnp.clip(jnp.asarray(groups.prompt_ids)[:, -1] - _FIRST_FAMILY, 0, task.families - 1)
        liking = likings[family[:, None], major]
        share = jnp.max(counts, axis=-1) / jnp.maximum(words, 1)
        return jnp.where(words > 0, liking + 0.25 * share, -1.0).astype(jnp.float32)
