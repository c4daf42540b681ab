"""What is measured on: random weights in the shapes of real models, random tokens in the lengths of real texts.

Speed depends on neither the weights' values nor the tokens', so that nothing has to be downloaded.
"""

import argparse
import functools
import json
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from activedpo_jax.data.groups import Bucket, Groups, PairPool
from activedpo_jax.data.packing import lengths_in
from activedpo_jax.huggingface import families
from activedpo_jax.models.config import LINEAR_MAPS, LoraConfig, ModelConfig
from activedpo_jax.models.decoder import Decoder, Params, init_params
from activedpo_jax.models.lora import Lora, init_lora

_FOLDER = pathlib.Path(__file__).parents[1] / "configs" / "shapes"  # a `config.json` of each model
MODELS = tuple(sorted(path.name for path in _FOLDER.iterdir()))

# Tokens of a prompt and of its two responses: 32 of AlpacaEval's 3,349 annotated pairs in SmolLM2's tokens, at equal
# distances in the order of their total.
LENGTHS = (
    (51, 13, 8), (35, 2, 56), (41, 37, 36), (33, 74, 26), (45, 31, 70), (76, 45, 40), (75, 96, 4), (51, 131, 8),
    (54, 10, 142), (41, 99, 80), (156, 76, 3), (61, 168, 22), (45, 205, 13), (51, 131, 97), (52, 110, 129),
    (53, 233, 20), (76, 124, 127), (154, 133, 52), (54, 106, 194), (51, 155, 163), (86, 159, 138), (53, 47, 296),
    (65, 263, 85), (44, 150, 235), (49, 258, 141), (47, 247, 168), (96, 266, 118), (51, 296, 155), (61, 270, 201),
    (112, 167, 295), (38, 285, 308), (80, 298, 358),
)  # fmt: skip

ATTENTION_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj")


def add_options(parser: argparse.ArgumentParser, remat: str, repeats: int) -> None:
    """The options of what is measured, which all sides have in common, with defaults that differ."""
    parser.add_argument("--model", default="smollm2_135m", choices=MODELS)
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--remat", default=remat, choices=["none", "dots", "full"])
    parser.add_argument("--factor", type=float, default=1.0, help="of mixed lengths")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--out", type=pathlib.Path, help="write the raw times here, as JSON")


def hf_config(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((_FOLDER / args.model / "config.json").read_text())
    return found | ({} if args.layers is None else {"num_hidden_layers": args.layers})


def make_decoder(args: argparse.Namespace) -> Decoder:
    maps = ATTENTION_MAPS if getattr(args, "attention_only", False) else LINEAR_MAPS
    lora = LoraConfig(rank=args.rank, alpha=2.0 * args.rank, target_modules=maps)
    return Decoder(families.model_config(hf_config(args)), lora, jnp.dtype(args.dtype), remat=args.remat)


def weights(decoder: Decoder) -> tuple[Params, Lora]:
    """Base weights in the decoder's dtype, and an adapter whose B is not zero, so that both sides can be compared."""
    shapes = jax.eval_shape(lambda: init_params(decoder, jax.random.key(0)))

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "scale":
            return jnp.full(shape.shape, 1 - decoder.config.norm_offset, decoder.dtype)
        salt = zlib.crc32(jax.tree_util.keystr(path).encode())
        return _scattered(shape.shape, salt, jnp.dtype(decoder.dtype).name)

    lora = init_lora(decoder.config, decoder.lora, jax.random.key(1))
    return jax.tree.map_with_path(leaf, shapes), jax.tree.map(
        lambda x: x + 0.01 * jax.random.normal(jax.random.key(2), x.shape, jnp.float32), lora
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _scattered(shape: tuple[int, ...], salt: int, dtype: str) -> jax.Array:
    """Uniform numbers with a standard deviation of 0.02, from a hash of their places.

    Next to `jax.random`, it needs no memory beside the result, which in the largest models is half of a GPU.
    """
    x = jnp.uint32(salt)
    for i in range(len(shape)):
        x = (x ^ jax.lax.broadcasted_iota(jnp.uint32, shape, i)) * jnp.uint32(0x85EBCA6B)
        x ^= x >> 13
    x = x * jnp.uint32(0xC2B2AE35)
    x ^= x >> 16
    return ((x >> 8).astype(jnp.float32) / 2**24 - 0.5).astype(dtype) * jnp.asarray(0.02 * 12**0.5, dtype)


def full_groups(vocabulary: int, count: int, prompt: int, response: int) -> Groups:
    """Groups of two responses without padding, so that every token is useful."""
    rng = np.random.default_rng(0)
    return Groups(
        rng.integers(0, vocabulary, (count, prompt), np.int32),
        np.full(count, prompt, np.int32),
        rng.integers(0, vocabulary, (count, 2, response), np.int32),
        np.full((count, 2), response, np.int32),
    )


def mixed_pairs(vocabulary: int, count: int, factor: float = 1.0) -> PairPool:
    """Pairs in the lengths of AlpacaEval's, times `factor`; the first response is preferred."""
    rng = np.random.default_rng(0)
    # Fewer than all at equal distances, too.
    places = np.arange(count) % len(LENGTHS) if count >= len(LENGTHS) else (2 * np.arange(count) + 1) * 16 // count
    lengths = [[max(1, round(factor * n)) for n in LENGTHS[i]] for i in rng.permutation(places)]
    return _pairs([[rng.integers(0, vocabulary, n).astype(np.int32) for n in several] for several in lengths])


def longest(pool: PairPool) -> Bucket:
    """The bucket that holds every pair."""
    lengths = lengths_in(pool)
    return Bucket(int(lengths.prompts.max()), int(lengths.responses.max()))


def full_pairs(vocabulary: int, count: int, prompt: int, response: int) -> PairPool:
    """Pairs without padding; the first response is preferred."""
    groups = full_groups(vocabulary, count, prompt, response)
    return _pairs([[p, *several] for p, several in zip(groups.prompt_ids, groups.response_ids, strict=True)])


def _pairs(tokens: list[list[np.ndarray]]) -> PairPool:
    """Of a prompt and two responses each."""
    count = len(tokens)
    return PairPool(
        prompt_tokens=[prompt for prompt, *_ in tokens],
        response_tokens=[responses for _, *responses in tokens],
        pairs=np.array([(i, 0, 1) for i in range(count)], np.int32),
        pair_ids=[str(i) for i in range(count)],
        prompt_texts=[""] * count,
        response_texts=[["", ""]] * count,
        preferences=np.zeros(count, np.int8),
        rewards=None,
    )


def useful_flops(config: ModelConfig, tokens: int, responses: int) -> float:
    """4 FLOPs for each useful token and each parameter that it goes through: forward, and backward to the inputs.

    Logits are needed at response tokens alone.  What gradients of an adapter, attention and recomputation take is not
    counted.
    """
    tree = jax.eval_shape(lambda: init_params(Decoder(config, LoraConfig()), jax.random.key(0)))
    layers = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree["layers"]))
    return 4.0 * (layers * tokens + config.vocab_size * config.hidden_size * responses)
