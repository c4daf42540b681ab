"""What the policy says after the last round, beside what π_ref, the SFT model, says to the same held-out prompts.

A reward that has not labelled says which response is better.  Each model draws one response to each prompt, with random
numbers of its own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from activedpo_jax import layout
from activedpo_jax.data.batches import parts
from activedpo_jax.data.digests import digests_of_bytes
from activedpo_jax.data.groups import Bucket, PairPool, Texts, assign_buckets, pad_groups
from activedpo_jax.data.preferences import uniform
from activedpo_jax.evaluation import heldout
from activedpo_jax.evaluation.win_rates import length_controlled, mean_of, wins
from activedpo_jax.generation.decoding import DecodingSpec, Requests, Responses, respond
from activedpo_jax.models.decoder import unstack
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy
from activedpo_jax.progress import progress
from activedpo_jax.resumable import SavedWork, pieces

unstack_program = jax.jit(unstack, static_argnums=1)

MODELS = ("policy", "sft")  # π_θ, and π_ref, in this order everywhere


class Prompts(NamedTuple):
    """Different prompts, none of them learnt from."""

    ids: Sequence[str]  # digests of their tokens
    texts: Texts  # their tokens; no responses
    shown: Sequence[Any]  # as a person, or a reward function, reads them


class Setting(NamedTuple):
    """How responses are made and scored."""

    policy: Policy
    decoding: DecodingSpec
    buckets: Sequence[Bucket]  # which hold the prompts and the responses
    size: int  # prompts at a time
    packed: bool  # whether batches that are scored are
    text_of: Callable[[np.ndarray], str]  # the text of a response's tokens


class Compared(NamedTuple):
    """The responses of both models to n prompts."""

    prompts: Prompts
    tokens: list[list[np.ndarray]]  # of each prompt: int32 [length] of each of `MODELS`
    texts: list[list[str]]
    ended: np.ndarray  # [n, 2] bool: by a token that ends a response, not by the limit
    logps: np.ndarray  # [n, 2] float32, under π_θ
    ref_logps: np.ndarray  # [n, 2] float32, under π_ref

    @property
    def lengths(self) -> np.ndarray:
        """Tokens, [n, 2]."""
        return np.array([[len(response) for response in several] for several in self.tokens])


def draw_prompts(pool: PairPool, count: int) -> Prompts:
    """`count` of the pool's different prompts, the same for every seed, in their order; all, if there are fewer."""
    digests = digests_of_bytes(prompt.tobytes() for prompt in pool.prompt_tokens)
    rows = np.sort(np.unique(digests, axis=0, return_index=True)[1])
    rows = np.sort(np.random.default_rng(0).permutation(rows)[:count])
    tokens = [pool.prompt_tokens[row] for row in rows]
    texts = Texts(prompt_tokens=tokens, response_tokens=[[np.zeros(0, np.int32)]] * len(rows))
    return Prompts([digests[row].tobytes().hex() for row in rows], texts, [pool.prompt_texts[row] for row in rows])


def compare(setting: Setting, lora: Lora, prompts: Prompts, seed: int, saved: SavedWork) -> Compared:
    """Both models' responses, and how likely each is under both.

    Args:
      lora: of π_θ.
      saved: what is kept of it.
    """
    loras, found = (lora, setting.policy.reference), []
    for name, weights in zip(MODELS, loras, strict=True):
        draws = [uniform(seed, "evaluation", name, prompt) for prompt in prompts.ids]
        seeds = (np.array(draws) * 2**32).astype(np.uint32)
        found.append(_sample(setting, weights, prompts.texts, seeds, name, saved))
    tokens, ended = ([list(both) for both in zip(*(one[i] for one in found), strict=True)] for i in range(2))
    texts = [[setting.text_of(response) for response in both] for both in tokens]
    rows = np.arange(len(tokens), dtype=np.int32)
    pool = PairPool(
        prompt_tokens=prompts.texts.prompt_tokens,
        response_tokens=tokens,
        pairs=np.stack([rows, np.zeros_like(rows), np.ones_like(rows)], axis=1),
        pair_ids=prompts.ids,
        preferences=np.full(len(rows), -1, np.int8),
        rewards=None,
        prompt_texts=prompts.shown,
        response_texts=texts,
    )
    mesh = setting.decoding.mesh
    batches = heldout.Batches(pool, rows, setting.buckets, setting.size, mesh, setting.packed)
    logps, ref_logps = (
        heldout.log_probs(setting.policy, weights, batches, f"responses under {name}", saved)
        for name, weights in zip(MODELS, loras, strict=True)
    )
    return Compared(prompts, tokens, texts, np.array(ended), logps, ref_logps)


def _sample(
    setting: Setting, lora: Lora, prompts: Texts, seeds: np.ndarray, name: str, saved: SavedWork
) -> tuple[list[np.ndarray], list[bool]]:
    """One response to each prompt: its tokens, and whether it ended by itself.

    Args:
      seeds: [n] uint32, one for each prompt.
    """
    spec = setting.decoding
    size = layout.round_up(setting.size, spec.mesh)
    on_cpu = spec.mesh.devices.flat[0].platform == "cpu"
    weights = unstack_program(setting.policy.params, on_cpu), unstack_program(lora, False)
    buckets = [Bucket(width, 1) for width in sorted({bucket.prompt for bucket in setting.buckets})]
    chunks = parts(assign_buckets(prompts, buckets), buckets, 1, (size,))

    def requests(i: int) -> Requests:
        b, rows, _ = chunks[i]
        padded, missing = pad_groups(prompts, rows, buckets[b], size), (0, size - len(rows))
        samples = np.pad(np.zeros((len(rows), 1), np.int32), (missing, (0, 0)), constant_values=-1)
        asked = Requests(padded.prompt_ids, padded.prompt_len, np.pad(seeds[rows], missing), samples)
        return layout.put(asked, layout.batch(spec.mesh))

    def like(i: int) -> Responses:
        shapes = jax.eval_shape(functools.partial(respond, spec), *weights, requests(i))
        sharding = layout.batch(spec.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

    count = len(prompts.prompt_tokens)
    tokens, ended = [np.zeros(0, np.int32)] * count, [False] * count
    results = pieces(saved, f"responses_{name}", len(chunks), lambda i: respond(spec, *weights, requests(i)), like)
    with progress(total=count, desc=f"responses, {name}", unit="prompt") as bar:
        for (_, rows, _), result in zip(chunks, results, strict=True):
            made = layout.get(result)
            for place, row in enumerate(rows):
                tokens[row] = made.tokens[place, 0, : made.length[place, 0]]
                ended[row] = bool(made.ended[place, 0])
            bar.update(len(rows))
    return tokens, ended


def figures(compared: Compared, rewards: np.ndarray) -> dict[str, Any]:
    """What `evaluation.json` says of the comparison.

    Args:
      rewards: [n, 2] float64, of the responses of `MODELS`.

    Returns:
      win_rate, length_controlled_win_rate: of the policy, equal rewards counting half; see `win_rates`.
      kl, kl_a_token: the mean of log π_θ − log π_ref over the policy's responses, nats a response, and their sum over
        that of their tokens.  An estimate of KL(π_θ ‖ π_ref), and without bias at temperature 1 and without top-k and
        top-p: else the responses are not of π_θ itself.
      policy, sft: the mean reward, the mean tokens of a response, and the share that was cut at the limit.
    """
    lengths, won = compared.lengths, wins(*rewards.T)
    controlled = length_controlled(won, *lengths.T.astype(np.float64))
    ratios = compared.logps[:, 0].astype(np.float64) - compared.ref_logps[:, 0]
    of_models = {
        name: {
            "reward": mean_of(rewards[:, i])._asdict(),
            "tokens": float(lengths[:, i].mean()),
            "cut": float(1 - compared.ended[:, i].mean()),
        }
        for i, name in enumerate(MODELS)
    }
    return {
        "prompts": len(lengths),
        "win_rate": mean_of(won)._asdict(),
        "length_controlled_win_rate": controlled.win_rate._asdict(),
        "length_effect": controlled.length_effect,
        "kl": mean_of(ratios)._asdict(),
        "kl_a_token": float(ratios.sum() / lengths[:, 0].sum()),
        **of_models,
    }


def lines(compared: Compared, rewards: np.ndarray) -> list[dict[str, Any]]:
    """A line of `evaluation.jsonl` for each prompt."""
    prompts = compared.prompts
    return [
        {"id": prompts.ids[i], "prompt": prompts.shown[i]}
        | {
            name: {
                "response": compared.texts[i][j],
                "reward": float(rewards[i, j]),
                "tokens": len(compared.tokens[i][j]),
                "ended": bool(compared.ended[i, j]),
                "log_ratio": float(compared.logps[i, j]) - float(compared.ref_logps[i, j]),
            }
            for j, name in enumerate(MODELS)
        }
        for i in range(len(prompts.ids))
    ]


def line(found: dict[str, Any]) -> str:
    """The figures in one line."""

    def share(estimate: dict[str, float]) -> str:
        return f"{estimate['mean']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"

    policy, sft = (found[name] for name in MODELS)
    return (
        f"against the SFT model on {found['prompts']} held-out prompts, by {found['reward']}: win rate "
        f"{share(found['win_rate'])}, length-controlled {share(found['length_controlled_win_rate'])}; reward "
        f"{policy['reward']['mean']:.3g} against {sft['reward']['mean']:.3g}; {policy['tokens']:.0f} tokens against "
        f"{sft['tokens']:.0f}; KL {found['kl']['mean']:.2f} nats a response"
    )
