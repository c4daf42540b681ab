"""Responses to prompts: m different ones each, batch by batch; empty and duplicate ones are sampled again."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from activedpo_jax import layout
from activedpo_jax.data.batches import parts
from activedpo_jax.data.groups import Bucket, Texts, assign_buckets, pad_groups
from activedpo_jax.generation.decoding import DecodingSpec, Requests, respond
from activedpo_jax.models.decoder import Params
from activedpo_jax.models.lora import Lora
from activedpo_jax.progress import progress


@dataclasses.dataclass(frozen=True)
class GenerationSpec:
    """How responses are made.

    Raises:
      ValueError: m > 1 responses are asked of a model that always takes the likeliest token.
    """

    decoding: DecodingSpec
    responses: int  # m
    resamples: int  # how often empty and duplicate responses are sampled again
    chunk: int  # prompts at a time

    def __post_init__(self) -> None:
        if self.decoding.sampling.temperature == 0 and self.responses > 1:
            raise ValueError(
                f"{self.responses} responses with temperature 0 would all be the same; expected a temperature above 0, "
                "or one response: set config.generation.temperature or responses"
            )


class Responder(NamedTuple):
    """A model that responds, and how it does."""

    spec: GenerationSpec
    params: Params  # as `models.decoder.unstack` returns them, like the adapter
    lora: Lora | None  # None: the base model
    text_of: Callable[[np.ndarray], str]  # the text of a response's tokens, int32 [length]


def flawed(texts: Sequence[str]) -> list[int]:
    """The responses that are empty, or equal to an earlier one up to surrounding space."""
    texts = [text.strip() for text in texts]
    return [j for j, text in enumerate(texts) if not text or text in texts[:j]]


@dataclasses.dataclass
class Generated:
    """The m responses to one prompt."""

    tokens: list[np.ndarray]  # int32 [length] each, the stop token included
    logps: list[np.ndarray]  # float32 [length] each: log π(token | before) under the model itself, at temperature 1
    ended: list[bool]  # by a stop token, not by `length` tokens
    texts: list[str]

    @property
    def flawed(self) -> list[int]:
        """The responses that are empty, or equal to an earlier one up to surrounding space."""
        return flawed(self.texts)

    def replace(self, j: int, source: "Generated", i: int) -> None:
        for name in ("tokens", "logps", "ended", "texts"):
            getattr(self, name)[j] = getattr(source, name)[i]


def generate(
    responder: Responder,
    prompts: Sequence[np.ndarray],
    seeds: np.ndarray,
    widths: Sequence[int],
    wanted: Collection[int],
) -> Iterator[dict[int, Generated]]:
    """Responses to prompts of all lengths, batch by batch, with a progress bar.

    Args:
      prompts: the tokens of each, int32 [length].
      seeds: [n] uint32, one per prompt.
      widths: each prompt is padded to the smallest that holds it; there is one compiled program per width.
      wanted: the prompts that need responses.  A batch with one of these is made as a whole, so that its numbers are
        the same whatever else is wanted.

    Yields:
      The responses of a batch, by the row of their prompt.  After all `resamples` some may still be `flawed`.

    Raises:
      ValueError: a prompt is longer than the widest of `widths`.
    """
    with progress(total=len(prompts), initial=len(prompts) - len(wanted), desc="generating", unit="prompt") as bar:
        for width, rows in plan(prompts, widths, responder.spec):
            asked = set(wanted).intersection(rows.tolist())
            if asked:
                results = respond_to(responder, [prompts[i] for i in rows], seeds[rows], width)
                yield dict(zip(rows.tolist(), results, strict=True))
                bar.update(len(asked))


def plan(prompts: Sequence[np.ndarray], widths: Sequence[int], spec: GenerationSpec) -> list[tuple[int, np.ndarray]]:
    """Batches of prompts of one width each: (width, rows)."""
    buckets = [Bucket(width, spec.decoding.length) for width in sorted(set(widths))]
    texts = Texts(prompt_tokens=prompts, response_tokens=[[np.zeros(0, np.int32)]] * len(prompts))
    found = parts(assign_buckets(texts, buckets), buckets, spec.responses, (spec.chunk,))
    return [(buckets[part.bucket].prompt, part.places) for part in found]


def respond_to(responder: Responder, prompts: Sequence[np.ndarray], seeds: np.ndarray, width: int) -> list[Generated]:
    """The responses of one batch, in its order; arguments as in `generate`.

    Flawed responses are replaced by further samples of the same prompt and seed, so that a prompt's responses do not
    depend on the rest of its batch.
    """
    spec, params, lora, text_of = responder
    m, mesh = spec.responses, spec.decoding.mesh
    size = layout.round_up(spec.chunk, mesh)
    texts = Texts(prompt_tokens=prompts, response_tokens=[[np.zeros(0, np.int32)]] * len(prompts))
    padded = pad_groups(texts, np.arange(len(prompts)), Bucket(width, spec.decoding.length), size)
    seeds = np.pad(np.asarray(seeds, np.uint32), (0, size - len(prompts)))

    def sample(attempt: int, wanted: Sequence[int]) -> dict[int, Generated]:
        samples = np.full((size, m), -1, np.int32)
        samples[list(wanted)] = attempt * m + np.arange(m)
        requests = Requests(padded.prompt_ids, padded.prompt_len, seeds, samples)
        requests = layout.put(requests, layout.batch(mesh))
        tokens, lengths, ended, logps = jax.device_get(respond(spec.decoding, params, lora, requests))

        def generated(g: int) -> Generated:
            cut = [tokens[g, j, : lengths[g, j]] for j in range(m)]
            probs = [logps[g, j, : lengths[g, j]] for j in range(m)]
            return Generated(cut, probs, ended[g].tolist(), [text_of(t) for t in cut])

        return {g: generated(g) for g in wanted}

    results = sample(0, range(len(prompts)))
    for attempt in range(1, spec.resamples + 1):
        poor = [g for g, result in results.items() if result.flawed]
        if not poor or spec.decoding.sampling.temperature == 0:
            break
        for g, fresh in sample(attempt, poor).items():
            for i in range(m):
                bad = results[g].flawed
                taken = {text.strip() for text in results[g].texts} | {""}
                if bad and fresh.texts[i].strip() not in taken:
                    results[g].replace(bad[0], fresh, i)
    return [results[g] for g in range(len(prompts))]
