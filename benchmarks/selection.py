"""Speed and memory of exact greedy selection.

    python -m benchmarks.selection --out benchmarks/results/selection_cpu.json

  speed: `greedy` against the naive loop, which lowers all scores after each pick, on random pools and on the worst
    ones: identical rows, and tight clusters larger than the block with unequal norms.  Picks are compared too.
  many: K = 1,000 of 100,000 × 8,192 (or more: `--count`), against one product of the features with K rows and, where
    there is a GPU, a downdate a pick in PyTorch.
  public: fewer of them, against what PyTorch has: a downdate a pick, and GPyTorch's `linear_operator`, whose pivoted
    Cholesky factorisation of λI + ΦΦᵀ makes the same greedy choice.
  large: features in bfloat16, N = 200,000 and D = 8,192, on the device and streamed from a file: time, and what the
    process needs beside the features at its peak.
  rounding: picks and information gain of features rounded to bfloat16, measured on the unrounded ones.

What is compared runs interleaved after a warm-up.  Seconds are medians.  On a machine that does other work too, the
processor's seconds, those of all threads, are the figure to compare.
"""

import argparse
import functools
import json
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from activedpo_jax import layout
from activedpo_jax.selection.greedy import greedy
from activedpo_jax.selection.posterior import HIGHEST, TIE, downdate, explained, prior_variances, with_room
from activedpo_jax.selection.streamed import streamed
from benchmarks import measure

LAM = 0.5


@functools.partial(jax.jit, static_argnames="num_picks")
def naive(features: jax.Array, num_picks: int) -> jax.Array:
    """The loop that `greedy` replaces: K passes over the features [N, D] float32; the rows picked, [K]."""
    prior = prior_variances(features, LAM)

    def one_pick(k: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        scores, w, rows = carry
        row = jnp.argmax(scores + TIE * prior >= jnp.max(scores))
        new, _ = downdate(features[row], w, k, LAM)
        lower = jnp.maximum(scores - explained(features, new[None]), 0.0)
        scores = jnp.where(scores < 0, -jnp.inf, lower).at[row].set(-jnp.inf)
        return scores, w.at[k].set(new), rows.at[k].set(row)

    start = (prior, with_room(features[:0], num_picks), jnp.zeros(num_picks, jnp.int32))
    return jax.lax.fori_loop(0, num_picks, one_pick, start)[2]


def pool(kind: str, shape: tuple[int, int], seed: int = 0) -> Iterator[np.ndarray]:
    """Features [N, D] float32 of about unit length, 10,000 rows at a time."""
    count, dim = shape
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((2000, dim), np.float32) * np.float32(dim**-0.5)
    share = 1 / np.arange(1, 2001) ** 1.2
    for start in range(0, count, 10_000):
        rows = min(10_000, count - start)
        if kind == "identical":
            yield np.tile(centres[0], (rows, 1))
            continue
        noise = rng.standard_normal((rows, dim), np.float32)
        noise *= np.float32(dim**-0.5)
        if kind == "clusters":  # few common ones and many rare ones, heavy-tailed norms
            noise *= np.float32(0.4)
            noise += centres[rng.choice(2000, rows, p=share / share.sum())]
            noise *= rng.gamma(3.0, 0.4, (rows, 1)).astype(np.float32)
        elif kind == "tight":
            noise *= np.float32(1e-3)
            noise += centres[rng.integers(0, 4, rows)]
            noise *= rng.uniform(0.5, 1.5, (rows, 1)).astype(np.float32)
        yield noise


def whole(kind: str, shape: tuple[int, int]) -> np.ndarray:
    features = np.empty(shape, np.float32)
    for start, rows in zip(range(0, shape[0], 10_000), pool(kind, shape), strict=True):
        features[start : start + len(rows)] = rows
    return features


def interleaved(contenders: dict[str, Callable[[], Any]], repeats: int, warm: bool = False) -> dict[str, Any]:
    """Wall and processor seconds of each run, and the ratios of their medians to the last contender's.

    Args:
      warm: all but the last have run already.
    """
    for run in list(contenders.values())[-1 if warm else 0 :]:
        run()
    times = measure.in_turns(contenders, repeats)
    wall, processor = ({n: several[kind] for n, several in times.items()} for kind in ("seconds", "processor seconds"))
    found: dict[str, Any] = {"seconds": wall, "processor seconds": processor, "ratios": {}}
    last = list(contenders)[-1]
    for name in list(contenders)[:-1]:
        found["ratios"][f"{name} / {last}"] = {
            "seconds": statistics.median(wall[name]) / statistics.median(wall[last]),
            "processor seconds": statistics.median(processor[name]) / statistics.median(processor[last]),
        }
    return found


def picker(features: jax.Array, num_picks: int, block: int, mesh: Mesh) -> Callable[[], np.ndarray]:
    available, nothing = jnp.ones(features.shape[0], bool), jnp.zeros((0, features.shape[1]))
    run = functools.partial(greedy, features, available, nothing, LAM, num_picks=num_picks, block=block, mesh=mesh)
    return lambda: np.asarray(run().rows)


def fetched(program: Callable[[], jax.Array]) -> np.ndarray:
    return np.asarray(program())


def speed(args: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Against the naive loop."""
    found = {}
    for kind in ("normal", "clusters", "tight", "identical"):
        features = layout.put(whole(kind, (args.small, args.small_dim)))
        ours = picker(features, args.picks, args.block, mesh)
        loop = functools.partial(naive, features, num_picks=args.picks)
        same = int(np.sum(ours() == np.asarray(loop())))
        times = interleaved({"greedy": ours, "naive": functools.partial(fetched, loop)}, args.repeats)
        found[kind] = {"same picks": same, **times}
        report(f"{kind}, {args.picks} of {args.small} × {args.small_dim}", found[kind])
    return found


def many(args: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Many picks of many rows, against a product of the same FLOPs as applying every pick to every row."""
    found = {}
    for kind in ("clusters", "normal"):
        features = drawn(kind, (args.count, args.dim))
        ours = picker(features, args.many, args.block, mesh)
        contenders: dict[str, Callable[[], Any]] = {"greedy": ours}
        same = {}
        if jax.devices()[0].platform == "gpu":
            contenders["torch, a downdate a pick"] = functools.partial(torch_downdates, features, args.many)
            same = {"same picks": int(np.sum(ours() == contenders["torch, a downdate a pick"]()))}
        rows = features[: args.many] + 0.0
        contenders["product"] = functools.partial(fetched, functools.partial(_product, features, rows))
        found[kind] = same | interleaved(contenders, args.few_repeats, warm="same picks" in same)
        report(f"{kind}, {args.many} of {args.count} × {args.dim}", found[kind])
        del features, rows, contenders, ours
    return found


def drawn(kind: str, shape: tuple[int, int]) -> jax.Array:
    """`normal` or `clusters` as in `pool`, drawn on the device: on a host, a million rows would take minutes."""
    count, dim = shape
    centres = jax.random.normal(jax.random.key(0), (2000, dim)) * dim**-0.5
    share = -1.2 * jnp.log(jnp.arange(1, 2001))

    @functools.partial(jax.jit, donate_argnums=0)
    def fill(features: jax.Array, key: jax.Array, start: jax.Array) -> jax.Array:
        for_noise, for_centre, for_norm = jax.random.split(key, 3)
        noise = jax.random.normal(for_noise, (size, dim)) * dim**-0.5
        if kind == "clusters":
            noise = 0.4 * noise + centres[jax.random.categorical(for_centre, share, shape=(size,))]
            noise *= 0.4 * jax.random.gamma(for_norm, 3.0, (size, 1))
        return jax.lax.dynamic_update_slice_in_dim(features, noise, start, axis=0)

    size = min(10_000, count)
    features = jnp.zeros(shape, jnp.float32)
    for i in range(-(-count // size)):
        features = fill(features, jax.random.key(i + 1), jnp.int32(min(i * size, count - size)))
    return jax.block_until_ready(features)


def torch_downdates(features: jax.Array, num_picks: int) -> np.ndarray:
    """What one writes in PyTorch: V⁻¹ = I/λ − WᵀW, which grows by a row for a pick, and all scores lowered by it."""
    import torch

    phi = torch.from_dlpack(features)
    w = torch.zeros(num_picks, phi.shape[1], device=phi.device)
    scores = torch.linalg.vector_norm(phi, dim=1).square() / LAM
    rows = torch.zeros(num_picks, dtype=torch.long, device=phi.device)
    for k in range(num_picks):
        rows[k] = row = scores.argmax()
        picked = phi[row]
        u = picked / LAM - w[:k].T @ (w[:k] @ picked)
        w[k] = u / torch.sqrt(1 + picked @ u)
        scores -= torch.mv(phi, w[k]).square()
        scores[row] = -torch.inf
    return rows.cpu().numpy()


def public(args: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Some picks of many rows, against PyTorch."""
    found = {}
    for kind in ("clusters", "normal"):
        features = drawn(kind, (args.count, args.dim))
        contenders: dict[str, Callable[[], np.ndarray]] = {
            "greedy": picker(features, args.picks, args.block, mesh),
            "downdates": functools.partial(torch_downdates, features, args.picks),
            "pivots": functools.partial(pivoted_cholesky, features, args.picks),
        }
        picked = {name: run() for name, run in contenders.items()}
        same = {name: int(np.sum(picked["greedy"] == rows)) for name, rows in picked.items()}
        times = measure.in_turns(contenders, args.few_repeats)
        print(f"{kind}, {args.picks} of {args.count} × {args.dim}: {measure.medians(times)}, {same}", flush=True)
        found[kind] = {"times": times, "same picks": same}
        del features, contenders
    return found


def pivoted_cholesky(features: jax.Array, num_picks: int) -> np.ndarray:
    """The diagonal that is left of λI + ΦΦᵀ after the pivots S is λ + λ φᵀV⁻¹φ, V = λI + Σ_S φφᵀ."""
    import linear_operator
    import torch
    from linear_operator.operators import RootLinearOperator

    kernel = RootLinearOperator(torch.from_dlpack(features)).add_jitter(LAM)
    _, pivots = linear_operator.pivoted_cholesky(kernel, rank=num_picks, error_tol=0.0, return_pivots=True)
    found: np.ndarray = pivots[:num_picks].cpu().numpy()
    return found


@jax.jit
def _product(features: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.sum(jnp.matmul(features, rows.T, precision=HIGHEST), axis=-1)


def resident() -> int:
    """Bytes of the process in memory that are its own, without what it maps from files."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Peak:
    """The most that the process holds beyond `start`, in bytes."""

    def __init__(self, start: int) -> None:
        self.start = self.most = start

    def __enter__(self) -> "Peak":
        self.over = threading.Event()
        self.watch = threading.Thread(target=self.look, daemon=True)
        self.watch.start()
        return self

    def look(self) -> None:
        while not self.over.wait(0.005):
            self.most = max(self.most, resident())

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.watch.join()
        self.bytes = self.most - self.start


def large(args: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """bfloat16 features on the device and from a file."""
    shape = (args.large, args.dim)
    size = args.large * args.dim * 2
    static: dict[str, Any] = {"num_picks": args.picks, "block": args.block, "mesh": mesh}
    available, nothing = np.ones(args.large, bool), np.zeros((0, args.dim), np.float32)
    found: dict[str, Any] = {"bytes of the features": size}
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        path = pathlib.Path(directory) / "features"
        with path.open("wb") as file:
            for rows in pool("clusters", shape):
                file.write(rows.astype(ml_dtypes.bfloat16).tobytes())
        stored = np.memmap(path, ml_dtypes.bfloat16, "r", shape=shape)
        picks = {}
        for name in ("streamed", "on the device"):
            on_device = name == "on the device"
            start = resident() + size * on_device
            features = jax.block_until_ready(layout.put(np.array(stored))) if on_device else stored
            select = greedy if on_device else streamed
            walls, used = [], []
            with Peak(start) as peak:
                for _ in range(1 + args.few_repeats):  # the first compiles
                    began, processor = time.perf_counter(), time.process_time()
                    picks[name] = np.asarray(select(features, available, nothing, LAM, **static).rows)
                    walls.append(time.perf_counter() - began)
                    used.append(time.process_time() - processor)
            found[name] = {
                "seconds": walls[1:],
                "processor seconds": used[1:],
                "seconds with compiling": walls[0],
                "peak beside the features, bytes": peak.bytes,
                "as a share of the features": peak.bytes / size,
            }
            del features
            print(f"{args.picks} of {shape}, bfloat16, {name}: {json.dumps(found[name])}", flush=True)
    found["same picks"] = int(np.sum(picks["streamed"] == picks["on the device"]))
    return found


def rounding(args: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """What is lost by storing features in bfloat16."""
    found = {}
    for kind in ("normal", "clusters"):
        features = whole(kind, (args.small, args.small_dim))

        def gain(rows: np.ndarray, features: np.ndarray = features) -> float:
            phi = features[rows].astype(np.float64)
            return float(np.linalg.slogdet(np.eye(len(rows)) + phi @ phi.T / LAM)[1])

        exact, rounded = (
            picker(layout.put(x), args.picks, args.block, mesh)()
            for x in (features, features.astype(ml_dtypes.bfloat16))
        )
        chance = np.random.default_rng(1).choice(args.small, args.picks, replace=False)
        found[kind] = {
            "shared picks": len(set(exact.tolist()) & set(rounded.tolist())),
            "of": args.picks,
            "gain, nats": gain(exact),
            "gain of the rounded features' picks, nats": gain(rounded),
            "gain of random picks, nats": gain(chance),
        }
        print(f"rounding, {kind}: {json.dumps(found[kind])}", flush=True)
    return found


def report(title: str, found: dict[str, Any]) -> None:
    medians = {
        name: f"{statistics.median(found['seconds'][name]):.3f} s ({statistics.median(used):.3f} s of processor)"
        for name, used in found["processor seconds"].items()
    }
    same = f", {found['same picks']} same picks" if "same picks" in found else ""
    print(f"{title}: {medians}, {found['ratios']}{same}", flush=True)


PARTS = {"speed": speed, "many": many, "public": public, "large": large, "rounding": rounding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--small", type=int, default=20_000, help="rows where the naive loop is compared")
    parser.add_argument("--small_dim", type=int, default=1_024)
    parser.add_argument("--count", type=int, default=100_000, help="rows that many are picked of")
    parser.add_argument("--many", type=int, default=1_000)
    parser.add_argument("--large", type=int, default=200_000, help="rows in bfloat16")
    parser.add_argument("--dim", type=int, default=8_192)
    parser.add_argument("--picks", type=int, default=50)
    parser.add_argument("--block", type=int, default=1_024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--few_repeats", type=int, default=3, help="of what takes long")
    parser.add_argument("--directory", help="where the file of features is written for a while")
    parser.add_argument("--out", type=pathlib.Path, help="write the raw figures here, as JSON; other parts' stay")
    args = parser.parse_args()
    mesh = layout.make_mesh(ml_collections.ConfigDict({"data": 1, "fsdp": 1, "tensor": 1}), jax.devices()[:1])
    for name in args.parts:
        measure.save(args.out, name, args, {"results": PARTS[name](args, mesh)})


if __name__ == "__main__":
    main()
