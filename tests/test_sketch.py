"""The sketch against its definition and its promises: linear, unbiased, error 1/√D."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from activedpo_jax.models import gpu_sketch
from activedpo_jax.models.sketch import (
    Part,
    _random_words,
    _signs,
    _tile_by_tile,
    rademacher_projection,
    tiled_count_sketch,
)
from tests.tiny import relative_error


def sketch(grads: np.ndarray, dim: int, seed: int = 0, layer: int = 0, name: str = "q_proj/a") -> np.ndarray:
    return np.asarray(tiled_count_sketch(jnp.asarray(grads), dim, jnp.uint32(seed), jnp.int32(layer), name))


# Fewer entries than D, exactly one tile, several with a rest (unrolled), many (looped).
@pytest.mark.parametrize(("rows", "columns", "dim"), [(3, 5, 64), (8, 8, 64), (11, 13, 64), (37, 41, 64)])
def test_each_entry_goes_to_one_place_with_a_sign(rows: int, columns: int, dim: int) -> None:
    n = rows * columns
    matrix = sketch(np.eye(n, dtype=np.float32).reshape(n, rows, columns), dim)  # [n, D]: the linear map itself
    assert np.array_equal(np.sort(np.abs(matrix), axis=1)[:, -2:], np.tile([0.0, 1.0], (n, 1)))
    place, sign = np.abs(matrix).argmax(axis=1), matrix.sum(axis=1)
    # Within a tile the entries are a rotation, so none meet.
    for start in range(0, n, dim):
        tile = place[start : start + dim]
        assert np.array_equal((tile - tile[0]) % dim, np.arange(len(tile)))
    assert abs(sign.sum()) < 5 * np.sqrt(n)


def test_is_linear() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4, 9, 31)).astype(np.float32)
    assert relative_error(sketch(2 * a - 3 * b, 50), 2 * sketch(a, 50) - 3 * sketch(b, 50)) < 1e-5


def test_inner_products_are_unbiased_with_error_one_over_root_d() -> None:
    rng = np.random.default_rng(1)
    dim, seeds = 64, 2000
    a = rng.normal(size=(20, 50)).astype(np.float32)
    b = (0.5 * a + rng.normal(size=a.shape)).astype(np.float32)
    both = jnp.asarray(np.stack([a, b]))
    one = lambda s: tiled_count_sketch(both, dim, s, jnp.int32(0), "x")  # noqa: E731
    out = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(seeds, dtype=jnp.uint32)), np.float64)
    estimates = np.einsum("sd,sd->s", out[:, 0], out[:, 1])
    truth, scale = float(np.vdot(a, b)), float(np.linalg.norm(a) * np.linalg.norm(b))
    assert abs(estimates.mean() - truth) < 4 * estimates.std() / np.sqrt(seeds)
    assert estimates.std() < 1.6 * scale / np.sqrt(dim)  # √(1 + cos²) / √D at most, and some room


def test_seed_layer_and_matrix_each_give_another_sketch() -> None:
    grads = np.random.default_rng(2).normal(size=(1, 8, 40)).astype(np.float32)
    base = sketch(grads, 64)
    assert np.array_equal(base, sketch(grads, 64))
    for other in (sketch(grads, 64, seed=1), sketch(grads, 64, layer=1), sketch(grads, 64, name="q_proj/b")):
        cosine = np.vdot(base, other) / np.linalg.norm(base) / np.linalg.norm(other)
        assert abs(cosine) < 0.6


def test_examples_of_a_batch_do_not_touch() -> None:
    grads = np.random.default_rng(3).normal(size=(5, 8, 40)).astype(np.float32)
    for i in range(5):
        assert np.array_equal(sketch(grads, 64)[i : i + 1], sketch(grads[i : i + 1], 64))


def test_dense_reference_keeps_inner_products() -> None:
    rng = np.random.default_rng(4)
    grads = jnp.asarray(rng.normal(size=(2, 10, 30)).astype(np.float32))
    projected = rademacher_projection([("x", grads)], 4096, jnp.uint32(0), jnp.int32(0))
    exact, kept = np.asarray(grads.reshape(2, -1)), np.asarray(projected)
    assert np.abs(kept @ kept.T - exact @ exact.T).max() < 5 / np.sqrt(4096) * np.square(exact).sum(1).max()


# Whole blocks of tiles, a rest, and a D that is no multiple of the 32 signs of a word.
@pytest.mark.parametrize(
    ("rows", "columns", "dim"), [(3, 5, 64), (64, 64, 64), (37, 41, 64), (12, 13, 50), (12, 64, 33)]
)
def test_each_tile_is_signed_rolled_and_added_in_order(rows: int, columns: int, dim: int) -> None:
    """Bit for bit: no way of looping over tiles may change a sketch that somebody has stored."""
    n, name = rows * columns, "q_proj/a"
    grads = np.random.default_rng(5).normal(size=(2, rows, columns)).astype(np.float32)
    words = np.asarray(_random_words(jnp.uint32(3), jnp.int32(1), name, -(-n // 32) + n // dim + 1))
    signs = np.asarray(_signs(jnp.asarray(words[n // dim + 1 :])))[:n]
    signed, row = grads.reshape(2, n) * signs, np.zeros((2, 2 * dim), np.float32)
    for k in range(-(-n // dim)):
        tile, offset = signed[:, k * dim : (k + 1) * dim], int(words[k] % dim)
        row[:, offset : offset + tile.shape[1]] += tile
    assert np.array_equal(sketch(grads, dim, 3, 1, name), row[:, :dim] + row[:, dim:])


@pytest.mark.parametrize(("size", "dim"), [(15, 64), (4096, 64), (1517, 64), (156, 50), (768, 33), (64, 64)])
def test_the_kernel_for_gpus_makes_the_same_sketch(size: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sketch, "_INTERPRET", True)
    monkeypatch.setattr(gpu_sketch, "_ENTRIES", 16)
    flat = jnp.asarray(np.random.default_rng(7).normal(size=(3, size)).astype(np.float32))
    words = _random_words(jnp.uint32(3), jnp.int32(1), "q_proj/a", -(-size // 32) + size // dim + 1)
    offsets, words = (words[: size // dim + 1] % dim).astype(jnp.int32), words[size // dim + 1 :]
    forms = [jax.jit(form, static_argnums=3)(flat, words, offsets, dim) for form in (gpu_sketch.add_up, _tile_by_tile)]
    assert relative_error(*map(np.asarray, forms)) < 1e-6


@pytest.mark.parametrize(("rows", "columns", "dim"), [(64, 64, 64), (12, 13, 50), (12, 64, 33), (8, 3, 64)])
def test_sketches_of_parts_add_up(rows: int, columns: int, dim: int) -> None:
    grads = np.random.default_rng(6).normal(size=(2, rows, columns)).astype(np.float32)
    of_part = jax.jit(lambda g, i: tiled_count_sketch(g, dim, jnp.uint32(0), jnp.int32(0), "q_proj/a", Part(i, 4)))
    total = sum(
        np.asarray(of_part(part, jnp.int32(i)), np.float64) for i, part in enumerate(np.split(grads, 4, axis=1))
    )
    assert relative_error(total, sketch(grads, dim)) < 1e-6
