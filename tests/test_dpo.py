"""The DPO loss is TRL's, and what the paper says it is."""

import functools
import pathlib
import re
import types
from typing import Any, NamedTuple

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import trl
from hypothesis import given, settings
from hypothesis import strategies as st

from activedpo_jax import layout
from activedpo_jax.config import default
from activedpo_jax.data.groups import Bucket, Groups
from activedpo_jax.models.config import LoraConfig
from activedpo_jax.models.lora import Lora
from activedpo_jax.models.policy import Policy, response_logps
from activedpo_jax.rounds import learn
from activedpo_jax.rounds.state import Labelled
from activedpo_jax.training import losses, optimiser
from tests import tiny
from tests.tiny_hf import load_decoder, tiny_llama
from tests.tiny_tokenizer import CHATML, make_tokenizer

RANK, ALPHA = 4, 8.0
MODULES = LoraConfig().target_modules
RECORDS = [
    ("What colour is the sky?", "It is blue.", "The grass is green, and the sky is not."),
    ("Hello", "It is green", "No"),
    ("Is the grass green today?", "It is, and the sky is blue. Is it not?", "What is today?"),
]


class Trl(NamedTuple):
    """What TRL's trainer makes of one batch, and what it was made from."""

    folder: pathlib.Path
    loss: float
    metrics: dict[str, float]
    groups: Groups  # the chosen response first
    lora: Lora
    gradient: Lora


def to_tree(named: dict[str, torch.Tensor]) -> Lora:
    """`...layers.1.self_attn.q_proj.lora_A.default.weight` and its like, as our stacked matrices."""
    layers: dict[str, Any] = {module: {"a": {}, "b": {}} for module in MODULES}
    for name, tensor in named.items():
        found = re.search(r"layers\.(\d+)\.\w+\.(\w+)\.lora_(A|B)\.", name)
        assert found
        layers[found[2]][found[3].lower()][int(found[1])] = tensor.detach().numpy()
    stack = lambda of_layer: np.stack([of_layer[i] for i in range(len(of_layer))])  # noqa: E731
    return {"layers": {m: {k: stack(v) for k, v in ab.items()} for m, ab in layers.items()}}


def to_groups(batch: dict[str, torch.Tensor]) -> Groups:
    """TRL's rows, all chosen and then all rejected responses after their prompts, as groups."""
    n = len(batch["input_ids"]) // 2
    prompts, responses = [], []
    for ids, attended, completed in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        prompts.append(ids[(attended == 1) & (completed == 0)].numpy())
        responses.append(ids[completed == 1].numpy())
    width, length = max(map(len, prompts)), max(map(len, responses))
    out = Groups(
        np.zeros((n, width), np.int32),
        np.zeros(n, np.int32),
        np.zeros((n, 2, length), np.int32),
        np.zeros((n, 2), np.int32),
    )
    for g in range(n):
        np.testing.assert_array_equal(prompts[g], prompts[n + g])
        out.prompt_ids[g, width - len(prompts[g]) :] = prompts[g]
        out.prompt_len[g] = len(prompts[g])
        for j, response in enumerate((responses[g], responses[n + g])):
            out.response_ids[g, j, : len(response)] = response
            out.response_len[g, j] = len(response)
    return out


USUAL = [losses.LossSpec(kind, 0.1, 0.0) for kind in ("sigmoid", "sigmoid_norm", "ipo")]
USUAL += [
    losses.LossSpec("robust", 0.1, 0.2),
    losses.LossSpec("sigmoid", 0.5, 0.0, 0.7),
    losses.LossSpec("hinge", 0.5, 0.0),
]
OTHERS = [
    losses.LossSpec(kind, 0.1, 0.2 if kind == "exo_pair" else 0.0)
    for kind in sorted(losses.LOSSES.keys() - {"orpo", "kto"} - {spec.kind for spec in USUAL})
]


@pytest.fixture(
    scope="module",
    params=[*USUAL, *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS)],
    ids=lambda spec: f"{spec.kind}-{spec.beta}" + ("-sft" if spec.sft_weight else ""),
)
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[losses.LossSpec, Trl]:
    """TRL's own trainer on its own batch of ragged prompts and responses."""
    spec = request.param
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in RECORDS]
    options = {"beta": spec.beta, "loss_type": [spec.kind, "sft"], "loss_weights": [1.0, spec.sft_weight]}
    options |= {"label_smoothing": spec.label_smoothing}
    return spec, trained_by(trl.DPOTrainer, trl.DPOConfig, options, rows, tmp_path_factory.mktemp("trl"))


def trained_by(
    trainer_of: Any, config_of: Any, options: dict[str, Any], rows: Any, folder: pathlib.Path, seed: int = 0
) -> Trl:
    """What one of TRL's trainers makes of the rows, in one batch."""
    tokenizer = make_tokenizer(CHATML)
    base = tiny_llama(folder / "base", vocab_size=len(tokenizer), tie_word_embeddings=True)
    usual = {"use_cpu": True, "bf16": False, "report_to": [], "max_length": None}
    trainer = trainer_of(
        base,
        args=config_of(output_dir=str(folder / "out"), **usual, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES), lora_dropout=0.0),
    )
    model = trainer.model
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in weights)
    with torch.no_grad():  # A and B both at work, so that policy and reference differ
        generator = torch.Generator().manual_seed(seed)
        for weight in weights.values():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    gradient = to_tree({name: p.grad for name, p in weights.items()})
    return Trl(folder / "base", float(loss.detach()), metrics, to_groups(batch), to_tree(weights), gradient)


def swap(groups: Groups) -> Groups:
    return groups._replace(response_ids=groups.response_ids[:, ::-1], response_len=groups.response_len[:, ::-1])


@pytest.mark.parametrize("preference", [0, 1], ids=["chosen first", "chosen second"])
def test_loss_and_gradient_are_those_of_trl(theirs: tuple[losses.LossSpec, Trl], preference: int) -> None:
    spec, trl_ = theirs
    decoder, params = load_decoder(trl_.folder)
    decoder = decoder.clone(lora=LoraConfig(RANK, ALPHA))
    groups = swap(trl_.groups) if preference else trl_.groups
    n = len(RECORDS)
    ref, preferences = response_logps(decoder, params, None, groups), np.full(n, preference)
    share = 1 / losses.preferred_tokens(groups.response_len, preferences)
    pairs = losses.Preferences(preferences, ref, jnp.full(n, 1 / n), jnp.full(n, share))

    def loss(lora: Lora) -> tuple[jax.Array, losses.DpoMetrics]:
        return losses.loss(spec, decoder, params, lora, groups, pairs)

    (ours, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(trl_.lora)
    compared = losses.metrics(spec, jnp.asarray(pairs.ref_logps), groups.response_len, pairs).loss
    least = 0.01 if spec.kind in ("sigmoid", "hinge") else 1e-3 * abs(trl_.loss)
    assert abs(trl_.loss - float(compared)) > least  # or nothing would be compared
    assert float(ours) == pytest.approx(trl_.loss, abs=1e-5, rel=1e-5)
    assert float(metrics.accuracy) == pytest.approx(trl_.metrics["rewards/accuracies"], abs=1e-6)
    assert float(metrics.margin) == pytest.approx(trl_.metrics["rewards/margins"], abs=1e-5)
    assert_same_gradient(gradient, trl_.gradient)


def assert_same_gradient(ours: Lora, theirs: Lora) -> None:
    for module in MODULES:
        for matrix in ("a", "b"):
            got, wanted = ours["layers"][module][matrix], theirs["layers"][module][matrix]
            assert tiny.relative_error(got, wanted) < 1e-4, (module, matrix)


def test_kto_is_that_of_trl(tmp_path: pathlib.Path) -> None:
    """Loss and gradient of a batch in two parts, the second with padding; z₀ is of the responses to other prompts."""
    rows = [{"prompt": p, "completion": c, "label": True} for p, c, _ in RECORDS]
    rows += [{"prompt": p, "completion": r, "label": False} for p, _, r in RECORDS]
    beta, n = 0.5, len(RECORDS)
    options = {"beta": beta, "per_device_train_batch_size": len(rows), "train_sampling_strategy": "sequential"}
    trl_ = trained_by(trl.KTOTrainer, trl.KTOConfig, options, rows, tmp_path, seed=1)
    assert trl_.metrics["kl"] > 0.1  # not cut off at 0, or nothing would be compared
    decoder, params = load_decoder(trl_.folder)
    decoder = decoder.clone(lora=LoraConfig(RANK, ALPHA))
    policy = Policy(decoder, params, jax.tree.map(jnp.zeros_like, trl_.lora))
    bucket = Bucket(trl_.groups.prompt_ids.shape[1], trl_.groups.response_ids.shape[2])
    mesh = layout.make_mesh(default().mesh, jax.devices()[:1])
    dpo = optimiser.DpoSpec(losses.LossSpec("kto", beta, 0.0), optimiser.OptimiserSpec(1e-3))
    spec: Any = types.SimpleNamespace(bucket=bucket, mesh=mesh, training=types.SimpleNamespace(dpo=dpo))
    ref = response_logps(decoder, params, None, trl_.groups)
    labelled = Labelled(n, trl_.groups, None, np.zeros(n), np.ones(n), ref, None)  # type: ignore[arg-type]
    labelled = jax.tree.map(jnp.asarray, labelled)
    slots, weights = np.array([2, 0, 1, 0]), np.array([1 / n] * n + [0.0], np.float32)

    mismatch, gradient = (
        jax.jit(functools.partial(f, spec, policy)) for f in (learn.mismatch, learn.microbatch_gradient)
    )
    parts = [learn.Microbatch(slots[s], weights[s], bucket) for s in (slice(2), slice(2, 4))]
    answered = learn.others(slots, weights).reshape(2, 2)
    kl = sum(mismatch(trl_.lora, labelled, part, own) for part, own in zip(parts, answered, strict=True))
    assert float(kl) == pytest.approx(trl_.metrics["kl"], abs=1e-4)
    found = [gradient(trl_.lora, labelled, part, learn.Whole(1.0, kl)) for part in parts]
    total, metrics = jax.tree.map(jnp.add, *found)
    assert float(metrics.loss) == pytest.approx(trl_.loss, abs=1e-5)
    assert_same_gradient(total, trl_.gradient)


# --- Properties of the loss, from log-probs

FLOATS = st.floats(-50, 50, width=32)


@st.composite
def batches(draw: Any) -> tuple[np.ndarray, losses.Preferences]:
    """Log-probs of 1 to 5 pairs, their reference's, preferences, and equal shares."""
    n = draw(st.integers(1, 5))
    logps, ref = (np.array(draw(st.lists(FLOATS, min_size=2 * n, max_size=2 * n)), np.float32) for _ in range(2))
    preference = np.array(draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)))
    share = np.full(n, 1 / n, np.float32)
    return logps.reshape(n, 2), losses.Preferences(preference, ref.reshape(n, 2), share, share / 7)


def values(
    logps: Any, pairs: losses.Preferences, beta: float = 0.1, smoothing: float = 0.0, sft: float = 0.0
) -> np.ndarray:
    spec = losses.LossSpec("sigmoid", beta, smoothing, sft)
    return np.array(losses.metrics(spec, jnp.asarray(logps), jnp.ones(logps.shape), jax.tree.map(jnp.asarray, pairs)))


@settings(deadline=None, max_examples=30)
@given(batches(), st.floats(0.01, 2), st.floats(0, 0.4), st.sampled_from([0.0, 0.5]))
def test_loss_is_the_papers(
    batch: tuple[np.ndarray, losses.Preferences], beta: float, smoothing: float, sft: float
) -> None:
    logps, pairs = batch
    n, wide = np.arange(len(logps)), lambda x: np.asarray(x, np.float64)
    rewards = beta * (wide(logps) - wide(pairs.ref_logps))
    margins = rewards[n, pairs.preference] - rewards[n, 1 - pairs.preference]
    sigmoid_loss = np.logaddexp(0, -margins)
    smoothed = (1 - smoothing) * sigmoid_loss + smoothing * np.logaddexp(0, margins)
    sft_loss = -np.sum(wide(logps)[n, pairs.preference] * pairs.token_share)
    got = values(logps, pairs, beta, smoothing, sft)
    tolerance = 1e-5 * (1 + np.abs(rewards).max() + np.abs(sft_loss))
    np.testing.assert_allclose(got[[0, 2]], [smoothed.mean() + sft * sft_loss, margins.mean()], atol=tolerance)


@settings(deadline=None, max_examples=30)
@given(batches())
def test_the_side_does_not_matter(batch: tuple[np.ndarray, losses.Preferences]) -> None:
    logps, pairs = batch
    other = pairs._replace(preference=1 - pairs.preference, ref_logps=pairs.ref_logps[:, ::-1])
    np.testing.assert_allclose(values(logps[:, ::-1], other), values(logps, pairs), atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(batches(), st.data())
def test_parts_add_up_and_padding_is_nothing(batch: tuple[np.ndarray, losses.Preferences], data: Any) -> None:
    logps, pairs = batch
    cut = data.draw(st.integers(0, len(logps)))
    parts = [jax.tree.map(lambda x, s=s: x[s], (logps, pairs)) for s in (slice(0, cut), slice(cut, None))]
    together = sum(values(some, of_some, sft=0.5) for some, of_some in parts if len(some))
    np.testing.assert_allclose(together, values(logps, pairs, sft=0.5), rtol=1e-5, atol=1e-5)

    pad = lambda x, value: np.concatenate([x, np.full((2, *x.shape[1:]), value, x.dtype)])  # noqa: E731
    padded = losses.Preferences(*(pad(x, value) for x, value in zip(pairs[:4], (1, -3.0, 0.0, 0.0), strict=True)))
    whole = values(logps, pairs, sft=0.5)
    np.testing.assert_allclose(values(pad(logps, 7.0), padded, sft=0.5), whole, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(batches(), st.sampled_from(sorted(losses.LOSSES)), st.floats(0, 0.4))
def test_a_tie_is_half_of_each_order(batch: tuple[np.ndarray, losses.Preferences], kind: str, smoothing: float) -> None:
    logps, pairs = batch
    smoothing = max(smoothing, 0.01) if kind == "exo_pair" else smoothing
    spec, lengths = losses.LossSpec(kind, 0.1, smoothing, 0.5), 1 + np.arange(2 * len(logps)).reshape(-1, 2)
    pairs = pairs._replace(kl=np.array(3.0, np.float32))
    found = {
        preference: losses.metrics(
            spec, jnp.asarray(logps), lengths, pairs._replace(preference=np.full(len(logps), preference))
        )
        for preference in (0.0, 0.5, 1.0)
    }
    np.testing.assert_allclose(found[0.5].loss, (found[0.0].loss + found[1.0].loss) / 2, rtol=1e-5)
    assert found[0.5].margin == 0 and found[0.5].accuracy == pytest.approx(0.5)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_the_reference_model_knows_nothing(beta: float) -> None:
    logps = np.array([[-3.0, -5.0], [-2.0, -2.0]], np.float32)
    pairs = losses.Preferences(np.array([0, 1]), logps, np.full(2, 0.5, np.float32))
    np.testing.assert_allclose(values(logps, pairs, beta), [np.log(2), 0.5, 0.0], atol=1e-7)


@pytest.mark.parametrize("epsilon", [0.1, 0.3])
def test_smoothing_stops_at_a_finite_margin(epsilon: float) -> None:
    at = np.log((1 - epsilon) / epsilon)
    spec = losses.LossSpec("sigmoid", 0.1, epsilon)

    def loss(margin: jax.Array) -> jax.Array:
        ratios = jnp.stack([margin / spec.beta, jnp.zeros(())])[None]
        return losses.smoothed(spec, losses.Ordered(ratios, ratios, jnp.ones((1, 2))), 0.0)[0]

    slope = jax.vmap(jax.grad(loss))
    below, here, above = slope(jnp.array([at - 0.5, at, at + 0.5]))
    assert below < -0.01 and above > 0.01 and abs(here) < 1e-6


def test_orpo_is_the_papers_and_its_odds_are_those_of_trl() -> None:
    """On log-probs of a token from nearly 0 to very low."""
    from trl.experimental.orpo import ORPOTrainer

    logps = np.array([[-2e-3, -3.0], [-60.0, -0.4], [-7.0, -7.0]], np.float32)
    lengths = np.array([[2, 3], [4, 1], [7, 7]])
    pairs = losses.Preferences(np.zeros(3), np.zeros((3, 2), np.float32), np.full(3, 1 / 3, np.float32))
    averages = logps.astype(np.float64) / lengths
    odds = averages - np.log(-np.expm1(averages))
    beta = 0.3
    odds_loss = beta * np.logaddexp(0, odds[:, 1] - odds[:, 0])
    wanted = -averages[:, 0] + odds_loss
    found = losses.orpo(losses.LossSpec("orpo", beta, 0.0), losses.ordered(jnp.asarray(logps), lengths, pairs))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    stand_in = types.SimpleNamespace(beta=beta, accelerator=types.SimpleNamespace(device="cpu"))
    theirs = ORPOTrainer.odds_ratio_loss(stand_in, *torch.tensor(averages, dtype=torch.float32).T)[0]
    np.testing.assert_allclose(-theirs.numpy(), odds_loss, rtol=1e-5)


def test_exo_without_smoothing_is_refused() -> None:
    with pytest.raises(ValueError, match="label_smoothing=0 with config.dpo.loss='exo_pair'"):
        losses.LossSpec("exo_pair", 0.1, 0.0)
