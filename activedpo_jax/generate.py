"""Responses to prompts: a pool for people, judges or reward models to label, or for `data.train`.

    python -m activedpo_jax.generate --config configs/x.py --workdir DIR --config.generation.prompts=prompts.jsonl

Writes `DIR/responses.jsonl`, which `data.pool_files` describes.  The same command on the same work directory goes on
where it stopped.
"""

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from activedpo_jax import flags, layout, start
from activedpo_jax.data.groups import Bucket, Texts, assign_buckets, check_tokens, microbatches, pad_groups
from activedpo_jax.data.pool_files import PoolFiles
from activedpo_jax.data.preferences import uniform
from activedpo_jax.data.prompts import read_prompts
from activedpo_jax.data.templates import make_template
from activedpo_jax.data.tokenize import tokenize_texts
from activedpo_jax.generation.decoding import DecodingSpec, Requests, respond
from activedpo_jax.generation.sampling import Sampling
from activedpo_jax.huggingface import loading
from activedpo_jax.models.decoder import Params, unstack
from activedpo_jax.models.lora import Lora
from activedpo_jax.record import folders, inputs
from activedpo_jax.selection.strategies import STRATEGIES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class GenerationSpec:
    """How responses are made.

    Raises:
      ValueError: m > 1 responses of a model that always takes the likeliest token.
    """

    decoding: DecodingSpec
    responses: int  # m
    resamples: int  # how often what is empty or a duplicate is sampled anew
    chunk: int  # prompts at a time

    def __post_init__(self) -> None:
        if self.decoding.sampling.temperature == 0 and self.responses > 1:
            raise ValueError(
                f"{self.responses} responses with temperature 0 would all be the same; expected a temperature above 0, "
                "or one response: set config.generation.temperature or responses"
            )


@dataclasses.dataclass
class Generated:
    """The m responses to one prompt."""

    tokens: list[np.ndarray]  # int32 [length] each, the stop token included
    logps: list[np.ndarray]  # float32 [length] each: log π(token | before) of the model itself, at temperature 1
    ended: list[bool]  # by a stop token, not by `length` tokens
    texts: list[str]

    @property
    def flawed(self) -> list[int]:
        """Which responses are empty, or the same text as one before but for the space around it."""
        texts = [text.strip() for text in self.texts]
        return [j for j, text in enumerate(texts) if not text or text in texts[:j]]

    def replace(self, j: int, other: "Generated", i: int) -> None:
        for name in ("tokens", "logps", "ended", "texts"):
            getattr(self, name)[j] = getattr(other, name)[i]


def generate(
    spec: GenerationSpec,
    params: Params,
    lora: Lora | None,
    prompts: Sequence[np.ndarray],
    seeds: np.ndarray,
    widths: Sequence[int],
    text_of: Callable[[np.ndarray], str],
    wanted: Collection[int],
) -> Iterator[dict[int, Generated]]:
    """Responses to prompts of all lengths, batch by batch, with a progress bar.

    Args:
      params, lora: as `models.decoder.unstack` gives them.
      prompts: of each its tokens, int32 [length].
      seeds: [n] uint32, one a prompt.
      widths: that prompts are padded to, each prompt to the smallest that holds it; one compiled program each.
      text_of: the text of a response's tokens.
      wanted: which of the prompts.  A batch with one of these is made as a whole, so that its numbers are the same
        whatever else is wanted.

    Yields:
      The responses of a batch by the row of their prompt.  After `spec.resamples` attempts some may still be `flawed`.

    Raises:
      ValueError: a prompt is longer than the widest of `widths`.
    """
    with tqdm(total=len(prompts), initial=len(prompts) - len(wanted), desc="generating", unit="prompt") as bar:
        for width, rows in plan(prompts, widths, spec):
            asked = set(wanted).intersection(rows.tolist())
            if asked:
                results = respond_to(spec, params, lora, [prompts[i] for i in rows], seeds[rows], width, text_of)
                yield dict(zip(rows.tolist(), results, strict=True))
                bar.update(len(asked))


def plan(prompts: Sequence[np.ndarray], widths: Sequence[int], spec: GenerationSpec) -> list[tuple[int, np.ndarray]]:
    """Batches of prompts of one width each: (width, rows)."""
    buckets = [Bucket(width, spec.decoding.length) for width in sorted(set(widths))]
    texts = Texts(prompt_tokens=prompts, response_tokens=[[np.zeros(0, np.int32)]] * len(prompts))
    return [(buckets[b].prompt, rows) for b, rows in microbatches(assign_buckets(texts, buckets), spec.chunk)]


def respond_to(
    spec: GenerationSpec,
    params: Params,
    lora: Lora | None,
    prompts: Sequence[np.ndarray],
    seeds: np.ndarray,
    width: int,
    text_of: Callable[[np.ndarray], str],
) -> list[Generated]:
    """The responses of one batch, in its order; arguments as of `generate`.

    What is flawed is replaced by further samples of the same prompt and seed, so that a prompt's responses do not
    depend on what it shares the batch with.
    """
    m, mesh = spec.responses, spec.decoding.mesh
    size = layout.round_up(spec.chunk, mesh)
    texts = Texts(prompt_tokens=prompts, response_tokens=[[np.zeros(0, np.int32)]] * len(prompts))
    padded = pad_groups(texts, np.arange(len(prompts)), Bucket(width, spec.decoding.length), size)
    seeds = np.pad(np.asarray(seeds, np.uint32), (0, size - len(prompts)))

    def sample(attempt: int, wanted: Sequence[int]) -> dict[int, Generated]:
        samples = np.full((size, m), -1, np.int32)
        samples[list(wanted)] = attempt * m + np.arange(m)
        requests = Requests(padded.prompt_ids, padded.prompt_len, seeds, samples)
        requests = jax.device_put(requests, layout.batch(mesh))
        tokens, lengths, ended, logps = jax.device_get(respond(spec.decoding, params, lora, requests))

        def one(g: int) -> Generated:
            cut = [tokens[g, j, : lengths[g, j]] for j in range(m)]
            probs = [logps[g, j, : lengths[g, j]] for j in range(m)]
            return Generated(cut, probs, ended[g].tolist(), [text_of(t) for t in cut])

        return {g: one(g) for g in wanted}

    results = sample(0, range(len(prompts)))
    for attempt in range(1, spec.resamples + 1):
        flawed = [g for g, result in results.items() if result.flawed]
        if not flawed or spec.decoding.sampling.temperature == 0:
            break
        for g, fresh in sample(attempt, flawed).items():
            for i in range(m):
                bad = results[g].flawed
                taken = {text.strip() for text in results[g].texts} | {""}
                if bad and fresh.texts[i].strip() not in taken:
                    results[g].replace(bad[0], fresh, i)
    return [results[g] for g in range(len(prompts))]


# The command


def stop_tokens(path: str, revision: str, tokenizer: "PreTrainedTokenizerBase", template: str) -> tuple[int, ...]:
    """What ends a response: the tokens that the model's files and its tokenizer say, and that which the template writes
    at the end of one.

    Raises:
      ValueError: there is none.
    """
    writer = make_template(template, tokenizer)
    stop = {*loading.eos_token_ids(path, revision), tokenizer.eos_token_id, *writer.trailing}
    stop |= set(tokenizer(writer.end, add_special_tokens=False)["input_ids"][-1:])
    return tuple(sorted(int(token) for token in stop - {None}))


def make_spec(config: ml_collections.ConfigDict, decoder: Any, stop: tuple[int, ...], mesh: Any) -> GenerationSpec:
    options = config.generation
    sampling = Sampling(float(options.temperature), options.top_k, float(options.top_p))
    decoding = DecodingSpec(decoder.clone(unrolled=True), sampling, stop, options.max_new_tokens, mesh)
    return GenerationSpec(decoding, options.responses, options.resamples, options.prompts_per_chunk)


def described(config: ml_collections.ConfigDict, texts: Texts) -> dict[str, Any]:
    """What `inputs.hold` compares when a command resumes."""
    return {"prompts": inputs.describe_texts(texts, config.generation.prompts), **start.fingerprints(config)}


def main(argv: Sequence[str] | None = None) -> None:
    config, folder = flags.read_plain_run(sys.argv if argv is None else argv, STRATEGIES)
    options, model = config.generation, config.model
    with flags.clean_errors():
        if not options.prompts or not model.path:
            missing = "generation.prompts" if not options.prompts else "model.path"
            raise ValueError(f"config.{missing} is empty; expected prompts and a model to respond to them: set it")
        if len(config.seeds) > 1:
            raise ValueError(f"config.seeds: got {tuple(config.seeds)}, expected one seed: a pool is sampled once")
        folders.check_workdir(folder, config, "generate")
        mesh = layout.make_mesh(config.mesh)
        records = read_prompts(options.prompts, options.split)
        tokenizer = loading.load_tokenizer(model.path, model.revision)
        widths = [prompt for prompt, _ in config.data.buckets]
        kwargs = start.template_kwargs(config)
        texts = tokenize_texts(records, tokenizer, config.data.template, max(widths), options.max_new_tokens, kwargs)
        for note in texts.notes:
            print(f"prompts: {note}")
        stop = stop_tokens(model.path, model.revision, tokenizer, config.data.template)
        decoder = start.load_decoder(config, mesh)
        check_tokens(texts, decoder.config.vocab_size, options.prompts)
        spec = make_spec(config, decoder, stop, mesh)
        folders.open_workdir(folder, config, "generate")
        inputs.hold(folder / "inputs" / "prompts.json", described(config, texts))
        files = PoolFiles(folder, records)
        params: Params = {}
        lora = None
        if files.missing:
            on_cpu = mesh.devices.flat[0].platform == "cpu"
            take_apart = jax.jit(unstack, static_argnums=1)
            params = take_apart(start.load_params(config, mesh, decoder.dtype), on_cpu)
            lora = unstack(start.initial_lora(config, decoder, mesh, config.seeds[0])) if config.lora.path else None

    def text_of(tokens: np.ndarray) -> str:
        ids = tokens[:-1] if len(tokens) and tokens[-1] in stop else tokens
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    seeds = np.array([uniform(config.seeds[0], "generation", r.id) * 2**32 for r in records]).astype(np.uint32)
    with flags.clean_errors():
        for results in generate(spec, params, lora, texts.prompt_tokens, seeds, widths, text_of, files.missing):
            files.add(results)
    print(files.finish(options.responses, options.max_new_tokens, options.resamples))


if __name__ == "__main__":
    main()
