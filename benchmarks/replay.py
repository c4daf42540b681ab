"""Every strategy on frozen pools: what it picks is all that differs.

    python -m benchmarks.replay --out benchmarks/results/replay_cpu.json
    python -m benchmarks.replay --strategies my_rules:mine --out benchmarks/results/replay_cpu.json   # yours; see below

Pools are made first, where they are not there yet (`--pools`): for every seed a tiny decoder is trained on the
procedural task, and what strategies look at is computed once, at its fresh adapter: gradients of all responses,
embeddings, entropies. Of two kinds:

    heavy_tail    most prompts are of a few families (Zipf 1.5), while the held-out pairs are of all alike
    balanced      all families are as common, so that there is less to gain by choosing

A round then picks K pairs, is told which response has the larger true reward, and fits a linear Bradley–Terry model
to all labels so far by maximum a posteriori: r(x, y) = wᵀĝ(x, y), DPO linearised at the starting point.  Margins and
rewards are those of this model.  No network is trained, nothing is sampled, and the same pools give the same picks:
each record has their digest.

Your own strategy is a name, `module:function`, of a function of evidence that returns a score for every row; the README
has two examples.  With an `--out` that has results of the same pools, it becomes a row of their table, which is
printed.
"""

import argparse
import functools
import hashlib
import json
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import special

from activedpo_jax import layout, programs, start, tasks
from activedpo_jax.data.groups import group_pairs, pad_groups
from activedpo_jax.data.synthetic import STOP, SyntheticTask
from activedpo_jax.evidence import registry
from activedpo_jax.evidence.gradients import scaled_features
from activedpo_jax.evidence.spec import EvidenceSpec, FeatureSpec
from activedpo_jax.models.policy import Policy
from activedpo_jax.record.comparison import area
from activedpo_jax.selection import strategies
from activedpo_jax.selection.greedy import Picks
from activedpo_jax.selection.widths import pair_vectors
from benchmarks import measure, tables
from configs import quickstart

KINDS = {"heavy_tail": 1.5, "balanced": 0.0}  # the exponent of the families' shares
_WORK = ("seeds", "rounds", "picks", "prompts", "responses", "families", "dim")  # options that say what is replayed
LAM = 0.03  # of V, and the precision of w's prior
_CHUNK = 100  # prompts whose evidence is computed at a time


class Pool(NamedTuple):
    """What is frozen of P prompts with m responses each, N pairs."""

    gradients: np.ndarray  # [P, m, D] float32, ĝ
    embeddings: np.ndarray  # [P, m, d] float32
    entropies: np.ndarray  # [P] float32
    pairs: np.ndarray  # [N, 3] int32: prompt, and two of its responses, i < j
    second: np.ndarray  # [N] bool, whether the second has the larger reward
    heldout: np.ndarray  # [H, D] float32, φ of the preferred response less the other


def load_pool(folder: pathlib.Path, kind: str, seed: int, sizes: argparse.Namespace) -> Pool:
    """From its file, which is made if it is not there."""
    names = f"{kind}_{seed}_{sizes.families}_{sizes.prompts}x{sizes.responses}x{sizes.dim}"
    path = folder / f"{names}.npz"
    if not path.exists():
        began = time.perf_counter()
        pool = make_pool(kind, seed, sizes)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path.with_suffix(".tmp.npz"), **pool._asdict())
        path.with_suffix(".tmp.npz").replace(path)
        print(f"{path} in {time.perf_counter() - began:.1f} s", flush=True)
    with np.load(path) as found:
        return Pool(**found)


def make_pool(kind: str, seed: int, sizes: argparse.Namespace) -> Pool:
    config = quickstart.get_config()
    config.synthetic.zipf, config.synthetic.styles = KINDS[kind], max(2, sizes.responses)
    config.synthetic.families = sizes.families
    mesh = layout.make_mesh(config.mesh, jax.devices()[:1])
    task = tasks.load(config, seed, mesh, None)
    lora = start.initial_lora(config, task.decoder, mesh, seed)
    policy = Policy(task.decoder, task.load_params(), lora)
    options = config.synthetic.to_dict()
    del options["pool_pairs"], options["heldout_pairs"]
    texts = SyntheticTask(**options).pool(seed, sizes.prompts, sizes.responses)
    assert texts.rewards is not None
    whole = computed(policy, texts, task.buckets[0], sizes.dim, mesh)
    held = computed(policy, task.heldout, task.buckets[0], sizes.dim, mesh)["gradients"]
    phi = held[:, 0] - held[:, 1]
    sign = np.where(task.heldout.preferences == 0, 1, -1)[:, None]
    return Pool(
        whole["gradients"],
        whole["states"],
        whole["entropies"],
        texts.pairs,
        texts.rewards[:, 1] > texts.rewards[:, 0],
        (sign * phi).astype(np.float32),
    )


def computed(policy: Policy, texts: Any, bucket: Any, dim: int, mesh: Mesh) -> dict[str, np.ndarray]:
    """Gradients [P, m, D], last states [P, m, d] and entropies [P] of all prompts."""
    spec = EvidenceSpec(FeatureSpec(dim), 1.0, mesh, entropy_samples=8, entropy_length=bucket.response, stop=STOP)

    @jax.jit
    def one(params: Any, lora: Any, groups: Any) -> dict[str, jax.Array]:
        policy_now = Policy(policy.decoder, params, lora)
        states: jax.Array = policy.decoder.apply({"params": params, "lora": lora}, groups, method="states")  # type: ignore[assignment]
        entropies = registry.compute(("entropies",), spec, policy_now, lora, groups, jnp.uint32(0))["entropies"]
        gradients = scaled_features(policy.decoder, params, lora, groups, spec.features, jnp.uint32(0))
        pairs = len(group_pairs(groups.response_ids.shape[1]))
        return {"gradients": gradients, "states": states, "entropies": entropies.reshape(-1, pairs)[:, 0]}

    parts = []
    for first in range(0, texts.num_groups, _CHUNK):
        rows = np.arange(first, min(first + _CHUNK, texts.num_groups))
        found = one(policy.params, policy.reference, pad_groups(texts, rows, bucket, _CHUNK))
        parts.append({name: np.asarray(x)[: len(rows)] for name, x in found.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def fitted(phi: np.ndarray, precision: float) -> np.ndarray:
    """w of the largest posterior: argmin Σ log(1 + exp(−φᵀw)) + precision ‖w‖²/2.

    By Newton's method on w = Φᵀa, whose equations are n × n.

    Args:
      phi: [n, D], the preferred response less the other.

    Returns:
      [D] float64.
    """
    phi = phi.astype(np.float64)
    kernel, a = phi @ phi.T, np.zeros(len(phi))

    def objective(a: np.ndarray) -> float:
        scores = kernel @ a
        return float(np.sum(np.logaddexp(0, -scores)) + precision * a @ scores / 2)

    for _ in range(100):
        p = special.expit(-(kernel @ a))
        slope = precision * a - p
        if np.abs(slope).max(initial=0) < 1e-12:
            break
        step = np.linalg.solve(precision * np.eye(len(a)) + (p * (1 - p))[:, None] * kernel, slope)
        length = 1.0
        while objective(a - length * step) > objective(a) + 1e-12 and length > 1e-6:
            length /= 2
        a = a - length * step
    return np.asarray(phi.T @ a)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def select(
    name: str, count: int, mesh: Mesh, pool: dict[str, jax.Array], rewards: jax.Array, taken: jax.Array, key: jax.Array
) -> Picks:
    """A round's picks, with the evidence of a run.

    Args:
      rewards: [P, m] float32, r̂ of all responses.
      taken: [places] int32, the rows that are labelled; −1: none yet.
    """
    rule = strategies.get(name)
    prompt, first, second = pool["pairs"].T
    both, embeddings = pool["gradients"][prompt[:, None], pool["pairs"][:, 1:]], pool["embeddings"]
    psi, of_pairs = (
        embeddings[prompt, first] - embeddings[prompt, second],
        rewards[prompt[:, None], pool["pairs"][:, 1:]],
    )
    margins = of_pairs[:, 0] - of_pairs[:, 1]
    p = jax.nn.sigmoid(margins)
    weight, phi = jnp.sqrt(p * (1 - p))[:, None], both[:, 0] - both[:, 1]
    evidence = strategies.Evidence(
        features=phi,
        response_features=both,
        fisher_features=weight * phi,
        embeddings=psi,
        fisher_embeddings=weight * psi,
        margins=margins,
        rewards=of_pairs,
        entropies=pool["entropies"][prompt],
        groups=prompt,
        responses=pool["pairs"][:, 1:],
        width_scale=jnp.float32(1),
    )
    there = taken >= 0
    available = jnp.ones(len(prompt), bool).at[jnp.where(there, taken, len(prompt))].set(False, mode="drop")
    known = None if rule.design is None else pair_vectors(evidence[rule.design][taken])
    seen = strategies.conditioned(rule, evidence, available, LAM, known, there)
    picks = rule.select(seen, available, key, count, 1024, mesh)
    return picks._replace(fallback=jnp.asarray(picks.fallback))


class Replayed(NamedTuple):
    """One strategy on one pool."""

    accuracy: list[float]  # [rounds + 1], held out
    rows: list[int]  # that were picked, in order
    fallbacks: int  # rounds in which there was nothing to rank by


def replay(pool: Pool, strategy: str, seed: int, rounds: int, count: int) -> Replayed:
    """All rounds of K labels."""
    mesh = layout.make_mesh(quickstart.get_config().mesh, jax.devices()[:1])
    on_device = {name: jnp.asarray(getattr(pool, name)) for name in ("gradients", "embeddings", "entropies", "pairs")}
    prompt, first, second = pool.pairs.T
    phi = pool.gradients[prompt, first] - pool.gradients[prompt, second]
    phi = np.where(pool.second[:, None], -phi, phi)
    taken, w, accuracy, fallbacks = np.full(rounds * count, -1, np.int32), np.zeros(phi.shape[1]), [], 0
    for number in range(rounds + 1):
        scores = pool.heldout @ w
        accuracy.append(float(np.mean((scores > 0) + 0.5 * (scores == 0))))
        if number == rounds:
            break
        key = jax.random.fold_in(jax.random.key(seed), number + 1)
        rewards = (pool.gradients @ w).astype(np.float32)
        picks = jax.device_get(select(strategy, count, mesh, on_device, rewards, taken, key))
        if np.any(picks.rows < 0):
            raise FloatingPointError(f"{strategy}: no picks in round {number + 1}: its scores are not finite")
        taken[number * count : (number + 1) * count] = picks.rows
        fallbacks += bool(picks.fallback)
        w = fitted(phi[taken[taken >= 0]], LAM)
    return Replayed(accuracy, taken.tolist(), fallbacks)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--strategies", nargs="+", default=sorted(strategies.STRATEGIES))
    found.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    found.add_argument("--seeds", type=int, default=10, help="0, 1, ... so many")
    found.add_argument("--rounds", type=int, default=8)
    found.add_argument("--picks", type=int, default=16, help="a round")
    found.add_argument("--prompts", type=int, default=400)
    found.add_argument("--responses", type=int, default=3, help="to each prompt")
    found.add_argument("--families", type=int, default=12, help="kinds of prompts")
    found.add_argument("--dim", type=int, default=2048)
    found.add_argument("--pools", type=pathlib.Path, default=pathlib.Path("runs/pools"))
    found.add_argument("--out", type=pathlib.Path)
    return found


def main() -> None:
    args = parser().parse_args()
    programs.keep(programs.default_place())
    for strategy in args.strategies:
        strategies.get(strategy)
    began = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    for kind in args.kinds:
        pools = [load_pool(args.pools, kind, seed, args) for seed in range(args.seeds)]
        results[kind] = {}
        for strategy in args.strategies:
            found = [replay(pool, strategy, seed, args.rounds, args.picks) for seed, pool in enumerate(pools)]
            digest = hashlib.sha256(json.dumps([one.rows for one in found]).encode()).hexdigest()[:16]
            curves = np.array([one.accuracy for one in found])
            areas = area(np.arange(args.rounds + 1.0), curves).tolist()
            results[kind][strategy] = {
                "accuracy": curves.round(6).tolist(),
                "area": [round(a, 6) for a in areas],
                "fallback rounds": sum(one.fallbacks for one in found),
                "digest of picks": digest,
            }
            spread = np.std(areas, ddof=1) / math.sqrt(len(areas)) if len(areas) > 1 else math.nan
            print(f"{kind:<12}{strategy:<20} area {np.mean(areas):.4f} ± {spread:.4f}  {digest}", flush=True)
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s")
    everything = with_earlier(args, results)
    if all("random" in found for found in everything.values()):
        print(tables.replay({"pools": everything}))
    measure.save(args.out, "replay", args, {"pools": everything, "seconds": seconds})


def with_earlier(args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The results, by kind and strategy, with those that `--out` has of the same pools and rounds."""
    if args.out is None or not args.out.exists():
        return results
    earlier = json.loads(args.out.read_text()).get("replay", {"arguments": {}, "pools": {}})
    if any(earlier["arguments"].get(name) != getattr(args, name) for name in _WORK):
        return results
    kinds = [kind for kind in KINDS if kind in results or kind in earlier["pools"]]
    return {kind: earlier["pools"].get(kind, {}) | results.get(kind, {}) for kind in kinds}


if __name__ == "__main__":
    main()
