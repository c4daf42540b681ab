"""The public face: ten lines of a notebook pick what the first round of `main` picks."""

import contextlib
import io
import json
import pathlib
import subprocess
import sys
from typing import Any

import datasets
import jax.numpy as jnp
import numpy as np
import pytest

import activedpo_jax
from activedpo_jax import api, main
from activedpo_jax.data.encoding import make_encoding
from activedpo_jax.data.records import read_records
from activedpo_jax.data.tokenize import encoded_pool
from tests.tiny_hf import tiny_llama
from tests.tiny_tokenizer import CHATML, make_tokenizer

ROOT = pathlib.Path(activedpo_jax.__file__).parents[1]
CONFIG = """
from activedpo_jax.config import default

def get_config():
    config = default()
    config.model.path, config.data.train, config.data.heldout = {model!r}, {data!r}, {data!r}
    config.lora.rank, config.lora.alpha = 4, 8.0
    config.data.buckets = ((32, 16),)
    config.features.dim = 64
    config.rounds, config.labels_per_round = 1, 4
    config.seeds = (3,)
    return config
"""
NOTEBOOK = """
import activedpo_jax

model = activedpo_jax.load_model({model!r}, rank=4, alpha=8.0, buckets=[(32, 16)], seed=3)
pool = activedpo_jax.read_pool({data!r}, model)
features = activedpo_jax.features(model, pool, dim=64)
choice = activedpo_jax.choose(features, 4)
for row, score in zip(choice.rows, choice.scores):
    group, first, second = pool.pairs[row]
    texts = pool.response_texts[group]
    print(pool.pair_ids[row], score, pool.prompt_texts[group], texts[first], texts[second], sep="|")
"""
PROMPTS = ["What colour is the sky?", "Is the grass green?", "Hello", "So it is blue", "And today?", "What is green?"]
ROWS: list[dict[str, Any]] = [
    {"prompt": p, "chosen": f"It is blue. {p}", "rejected": f"{p} Not today"} for p in PROMPTS
]
ROWS.append({"prompt": "Today?", "responses": ["It is", "It is not", "What is today?"], "rewards": [1.0, 0.5, 0.0]})


def save_model(folder: pathlib.Path) -> str:
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    tiny_llama(folder, vocab_size=len(tokenizer), tie_word_embeddings=True)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with `base/`, a model, `pairs.jsonl` and `config.py`."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model, data = save_model(folder / "base"), str(folder / "pairs.jsonl")
    (folder / "config.py").write_text(CONFIG.format(model=model, data=data))
    return folder


@pytest.fixture(scope="module")
def model(place: pathlib.Path) -> api.Model:
    return activedpo_jax.load_model(place / "base", rank=4, alpha=8.0, buckets=[(32, 16)], seed=3)


def test_a_notebook_picks_as_the_first_round_of_main(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(NOTEBOOK.format(model=str(place / "base"), data=str(place / "pairs.jsonl")), {})
    lines = [line.split("|") for line in shown.getvalue().splitlines() if "|" in line]

    main.main(["main", "--config", str(place / "config.py"), "--workdir", str(tmp_path / "run")])
    selected = tmp_path / "run" / "rounds" / "001" / "selected.jsonl"
    expected = [json.loads(line) for line in selected.read_text().splitlines()]
    assert len(lines) == 4
    for (pair_id, score, *texts), row in zip(lines, expected, strict=True):
        assert (pair_id, texts) == (row["pair_id"], [row["prompt"], row["first"], row["second"]])
        assert float(score) == pytest.approx(row["score"], rel=1e-5)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    gain = sum(np.log1p(float(score)) for _, score, *_ in lines)
    assert summary["rounds"][1]["information_gain"] == pytest.approx(gain, rel=1e-5)


def test_sources_are_the_same_pool(place: pathlib.Path, model: api.Model, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ROWS, dict(ROWS[0])]  # a copy, of which the ids and a note say so
    path = place / "more.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = encoded_pool(read_records(str(path)), make_encoding(model.tokenizer, "auto", 32, 16), 3)
    columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
    for source in (str(path), path, rows, iter(rows), datasets.Dataset.from_dict(columns)):
        pool = activedpo_jax.read_pool(source, model)
        assert pool.pair_ids == expected.pair_ids and pool.pair_ids[-1].endswith("#2")
        np.testing.assert_array_equal(pool.pairs, expected.pairs)
        assert [t.tolist() for t in pool.prompt_tokens] == [t.tolist() for t in expected.prompt_tokens]
        assert "pool: 1 of 10 pairs are there a second time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([ROWS[0], {"prompt": "Hello", "chosen": "It is"}], r"^row 1: the fields are .*expected `rejected`"),
        ([ROWS[0], "Hello"], r"^row 1: this is a string; expected a dict"),
        ([{**ROWS[0], "id": "a"}, {**ROWS[1], "id": "a"}], r"^row 1: id 'a' was given to row 0 already"),
        ([{**ROWS[0], "chosen": ""}], r"^row 0: chosen is an empty response"),
        ([], r"^source: there is no row"),
        ({"train": ROWS}, r"^source: this is an object; expected a list of dicts.*choose one of its splits"),
        (3, r"^source: this is a number; expected a list of dicts"),
        ("nowhere.jsonl", r"^nowhere.jsonl: no such file"),
    ],
)
def test_a_source_that_is_wrong_says_where(source: Any, message: str, model: api.Model) -> None:
    with pytest.raises(ValueError, match=message):
        activedpo_jax.read_pool(source, model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"^config\.lora\.rank: got 0, expected"),
        ({"rank": "many"}, r"^config\.lora\.rank: got 'many', expected a whole number"),
        ({"buckets": [(32,)]}, r"^config\.data\.buckets: got"),
        (
            {"options": {"model.quantization": "int8"}},
            r"no option 'model\.quantization'; the nearest is 'model\.quantisation'",
        ),
        ({"options": {"modell.dtype": "float32"}}, r"no option 'modell\.dtype'; the nearest is 'model\.dtype'"),
        ({"path": "/nowhere/base"}, r"^/nowhere/base: no such directory"),
    ],
)
def test_an_option_that_is_wrong_is_named(arguments: dict[str, Any], message: str, place: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=message):
        activedpo_jax.load_model(**{"path": place / "base", **arguments})


def test_features_have_options_of_their_own(model: api.Model) -> None:
    pool = activedpo_jax.read_pool(ROWS, model)
    found = activedpo_jax.features(model, pool, dim=48, normalisation="none", groups_per_chunk=24)
    assert found.shape == (9, 48) and found.dtype == np.float32
    assert np.linalg.norm(found, axis=1).max() > 2.5  # two unit vectors are at most 2 apart
    with pytest.raises(ValueError, match=r"^config\.features\.dim: got 0"):
        activedpo_jax.features(model, pool, dim=0)


# --- Choosing, from features alone


def features(seed: int = 0, pairs: int = 29, dim: int = 12) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(pairs, dim)) * rng.exponential(size=(pairs, 1))


def greedy(phi: np.ndarray, count: int, lam: float, known: np.ndarray, banned: list[int]) -> tuple[list[int], float]:
    """The loop of algorithm 1 in float64 with a dense V: rows, and the growth of log det V."""
    v = lam * np.eye(phi.shape[1]) + known.T @ known
    before = np.linalg.slogdet(v)[1]
    rows = list(banned)
    for _ in range(count):
        scores = np.einsum("nd,nd->n", phi, np.linalg.solve(v, phi.T).T)
        scores[rows] = -np.inf
        rows.append(int(np.argmax(scores)))
        v += np.outer(phi[rows[-1]], phi[rows[-1]])
    return rows[len(banned) :], float(np.linalg.slogdet(v)[1] - before)


@pytest.mark.parametrize("lam", [0.1, 1.0, 20.0])
def test_choose_is_the_greedy_loop(lam: float) -> None:
    phi = features()
    rows, gain = greedy(phi, 10, lam, phi[:0], [])
    for given in (phi, phi.astype(np.float32), jnp.asarray(phi), phi.tolist()):
        choice = activedpo_jax.choose(given, 10, lam=lam)
        assert isinstance(choice, activedpo_jax.Choice) and choice.rows.tolist() == rows
        assert choice.information_gain == pytest.approx(gain, rel=1e-5) and choice.lam == pytest.approx(lam)
    assert type(choice.rows) is type(choice.scores) is np.ndarray


def test_labelled_pairs_count_and_are_not_picked() -> None:
    phi = features()
    first = activedpo_jax.choose(phi, 5)
    rows, gain = greedy(phi, 6, 1.0, phi[first.rows], first.rows.tolist())
    more = activedpo_jax.choose(phi, 6, labelled=first.rows)
    assert more.rows.tolist() == rows and more.information_gain == pytest.approx(gain, rel=1e-5)
    # In two batches as in one.
    assert [*first.rows, *more.rows] == activedpo_jax.choose(phi, 11).rows.tolist()

    elsewhere = 5 * phi[rows[:3]]
    rows, gain = greedy(phi, 6, 1.0, elsewhere, [])
    others = activedpo_jax.choose(phi, 6, labelled=elsewhere)
    assert others.rows.tolist() == rows and others.information_gain == pytest.approx(gain, rel=1e-5)
    assert others.rows.tolist() != activedpo_jax.choose(phi, 6).rows.tolist()
    assert activedpo_jax.choose(phi, 6, labelled=[]).rows.tolist() == activedpo_jax.choose(phi, 6).rows.tolist()


def test_other_strategies() -> None:
    phi = features()
    norms = np.argsort(-np.sum(phi**2, axis=1))[:5]
    choice = activedpo_jax.choose(phi, 5, strategy="activedpo_norm")
    assert choice.rows.tolist() == norms.tolist() and choice.information_gain is None
    drawn = [activedpo_jax.choose(phi, 5, strategy="random", seed=seed).rows.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 5
    assert sorted(activedpo_jax.choose(phi, 28, [4], strategy="random").rows) == [i for i in range(29) if i != 4]


def with_entry(value: float) -> np.ndarray:
    phi = features()
    phi[7, 3] = value
    return phi


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": features()[0]}, r"^features: got shape \[12\] of float64; expected \[N, D\]"),
        ({"features": np.ones((3, 4), int)}, r"^features: got shape \[3, 4\] of int64"),
        ({"features": with_entry(np.nan)}, r"^features: row 7 \(from 0\) is not finite.*1 of 29"),
        ({"features": with_entry(1e30)}, r"^features: row 7 \(from 0\)"),
        ({"features": with_entry(1e300)}, r"^features: row 7 \(from 0\)"),
        ({"count": 0}, r"^count: got 0, expected from 1 to 29"),
        ({"count": 28, "labelled": [1, 2]}, r"^count: got 28, expected from 1 to 27"),
        ({"labelled": [29]}, r"^labelled: got row 29, expected rows from 0 to 28"),
        ({"labelled": [-1]}, r"^labelled: got row -1"),
        ({"labelled": [2, 2]}, r"^labelled: got a row twice"),
        ({"labelled": np.arange(29) < 3}, r"^labelled: got shape \[29\] of bool; expected row numbers"),
        ({"labelled": np.ones((2, 5))}, r"^labelled: got features of 5 columns, expected 12"),
        ({"lam": 0}, r"^lam: got 0, expected a number above 0"),
        ({"strategy": "margin"}, r"^strategy: 'margin' needs margins.*expected one of activedpo, "),
        ({"strategy": "activdpo"}, r"did you mean 'activedpo'"),
    ],
)
def test_an_argument_that_is_wrong_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        activedpo_jax.choose(**{"features": features(), "count": 3, **arguments})


def test_importing_is_cheap_and_the_names_are_there() -> None:
    script = (
        "import sys, activedpo_jax; assert 'jax' not in sys.modules and 'numpy' not in sys.modules; "
        "assert set(activedpo_jax.__all__) <= set(dir(activedpo_jax)); print(activedpo_jax.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == activedpo_jax.__version__
    assert set(activedpo_jax.__all__) == set(api.__all__)
    assert all(getattr(activedpo_jax, name) is getattr(api, name) for name in activedpo_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'chose'; there are .*choose"):
        _ = activedpo_jax.chose
