"""Picks pairs to label, for those who train elsewhere: reads a pool, writes a ranking and files to fill in.

    python -m activedpo_jax.select --config configs/x.py --workdir DIR --config.select.budget=50
        [--config.select.features=features.npy] [--config.select.labelled=labels.csv]

The pool is all of `data.train`, up to `data.train_limit`: no prompt is held out.  The command writes

    DIR/ranked.jsonl              in pick order: rank, pair_id, prompt, first, second, score, information_gain, strategy
    DIR/pairs.csv, pairs.jsonl    to fill in
    DIR/label_studio.json, ...    to import into labelling tools; see `oracles.formats`

The next batch needs another --workdir, and the labels so far in `select.labelled`.  Repeating a command with the same
work directory writes missing files and overwrites nothing.
"""

if __name__ == "__main__":  # first, since the imports take seconds
    from activedpo_jax import errors

    errors.end_at_signals()

import hashlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from safetensors import SafetensorError, safe_open

from activedpo_jax import api, errors, files, flags, layout, start
from activedpo_jax.data.draws import limit
from activedpo_jax.data.groups import Candidates, PairPool, check_tokens
from activedpo_jax.data.pairs import shown_pairs
from activedpo_jax.data.preferences import Record
from activedpo_jax.data.records import read_records
from activedpo_jax.data.sources import fail
from activedpo_jax.data.tokenize import shown_texts
from activedpo_jax.huggingface import loading
from activedpo_jax.oracles import formats
from activedpo_jax.oracles.labels import Question
from activedpo_jax.record import folders, inputs
from activedpo_jax.record.labels import verdicts
from activedpo_jax.selection import host, strategies
from activedpo_jax.selection.strategies import STRATEGIES
from activedpo_jax.selection.widths import pair_vectors

_RANKED = "ranked.jsonl"
_TO_FILL_IN = ("pairs.csv", "pairs.jsonl")
_DTYPES = ("F16", "BF16", "F32", "F64")  # of features, as safetensors names them
_LABELLED = (".jsonl", ".csv", ".tsv", ".json", ".txt")


def main(argv: Sequence[str] | None = None) -> None:
    config, folder, _ = flags.read_plain_run(sys.argv if argv is None else argv, STRATEGIES)
    with errors.clean_errors():
        check_options(config)
        folders.check_workdir(folder, config, "select")
        check_free(folder)
        records = read_records(config.data.train, config.data.train_split)
        if config.data.train_limit:
            records = limit(records, config.data.train_limit, config.seeds[0])
        tokenizer, given = None, None
        if config.select.features:
            pool = without_tokens(records, config.seeds[0])
            given = read_features(pathlib.Path(config.select.features), pool.num_pairs)
        else:
            tokenizer = loading.load_tokenizer(config.model.path, config.model.revision)
            pool = api.tokenized(records, config, tokenizer)
            vocabulary = loading.load_config(config.model.path, config.model.revision).vocab_size
            check_tokens(pool, vocabulary, config.data.train)
            for note in pool.notes:
                print(f"pool: {note}")
        labelled = read_labelled(config, pool)
        check_budget(config, pool, labelled)
        folders.open_workdir(folder, config, "select")
        inputs.hold(folder / "inputs" / "pool.json", described(config, pool))
        if not (folder / _RANKED).exists():
            rank(config, folder, pool, labelled, given, tokenizer)
        rows = read_ranked(folder / _RANKED)
        write_label_files(folder, rows)
        print(summary(rows, pool.num_pairs, len(labelled), folder))


def check_options(config: ml_collections.ConfigDict) -> None:
    """Checks that the options suit this command.

    Raises:
      ValueError: one does not.
    """
    for name in ("strategies", "seeds"):
        if len(config[name]) > 1:
            raise ValueError(f"config.{name}: got {', '.join(map(str, config[name]))}; expected one for a selection")
    if config.data.train == "synthetic":
        raise ValueError(
            "config.data.train: got 'synthetic', which is not for people to label; expected a file or a `datasets` name"
        )
    strategy = strategies.get(config.strategies[0])
    if config.select.features and not strategy.needs <= {"features"}:
        usable = [name for name, other in STRATEGIES.items() if other.needs <= {"features"}]
        raise ValueError(
            f"config.strategies: {strategy.name} needs {' and '.join(sorted(strategy.needs))} from a model, and "
            f"config.select.features has features alone; expected one of {', '.join(usable)}, or no select.features"
        )
    if config.select.in_blocks and not strategy.gains:
        usable = [name for name, other in STRATEGIES.items() if other.gains]
        raise ValueError(
            f"config.select.in_blocks: got True with strategy {strategy.name}, which ranks all rows at once; expected "
            f"one of {', '.join(usable)}, or no select.in_blocks"
        )
    if config.sft.data and not config.select.features:
        raise ValueError(
            f"config.sft.data: got {config.sft.data!r}, but `select` trains nothing; expected an empty one: run "
            "activedpo_jax.sft first, and give its result in config.lora.path or config.model.path"
        )


def check_free(folder: pathlib.Path) -> None:
    """Checks that no label file of other origin is in the directory: people may have filled it in.

    Raises:
      ValueError: a label file is there without a ranking.
    """
    for name in sorted({*_TO_FILL_IN, *formats.TASKS}):
        if (folder / name).exists() and not (folder / _RANKED).exists():
            raise ValueError(
                f"{folder / name}: exists without the {_RANKED} it would belong to, and is not overwritten; expected "
                "neither or both: give another --workdir"
            )


def without_tokens(records: Sequence[Record], seed: int) -> Candidates:
    """The pairs of a pool without tokens; ids, order and sides are those of `data.tokenize.encoded_pool`.

    Raises:
      ValueError: two pairs have the same id.
    """
    pairs, pair_ids = shown_pairs(records, seed)
    prompt_texts, response_texts = shown_texts(records)
    return Candidates(
        prompt_tokens=[],
        response_tokens=[],
        pairs=pairs,
        pair_ids=pair_ids,
        prompt_texts=prompt_texts,
        response_texts=response_texts,
    )


def read_features(path: pathlib.Path, num_pairs: int) -> np.ndarray:
    """`config.select.features`: [N, D] float32.

    Raises:
      ValueError: the file is not there, not whole, or not of these pairs.
    """
    option = f"config.select.features={path}"
    if path.suffix not in (".npy", ".safetensors"):
        raise ValueError(f"{option}: the suffix is {path.suffix!r}; expected .npy or .safetensors")
    if not path.is_file():
        raise ValueError(f"{option}: no such file; expected [{num_pairs}, D] floats, a row for each pair of the pool")
    try:
        found = host.as_features(_read_array(path), str(path))
    except (OSError, EOFError, SafetensorError) as error:
        raise ValueError(f"{path}: not a whole {path.suffix} file ({error}); write it again") from error
    if len(found) != num_pairs:
        raise ValueError(
            f"{option}: {len(found)} rows, but the pool has {num_pairs} pairs; expected a row for each pair, in the "
            "order of config.data.train (of a record with m responses the pairs (0,1), (0,2), ..., (1,2), ...)"
        )
    return found


def _read_array(path: pathlib.Path) -> np.ndarray:
    if path.suffix == ".npy":
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)  # rows are read when they are looked at
        except ValueError as error:  # also where the file is cut short
            raise ValueError(
                f"{path}: not an array of numbers that NumPy has saved ({error}); write it again"
            ) from error
    with safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        if "features" not in names and len(names) != 1:
            raise ValueError(
                f"{path}: the tensors are {', '.join(sorted(names)) or 'none'}; expected one named features, or only "
                "one"
            )
        name = "features" if "features" in names else names[0]
        if (dtype := file.get_slice(name).get_dtype()) not in _DTYPES:
            raise ValueError(f"{path}: tensor {name} is {dtype}; expected one of {', '.join(_DTYPES)}")
        return np.asarray(file.get_tensor(name))


def read_labelled(config: ml_collections.ConfigDict, pool: Candidates) -> dict[str, bool]:
    """Reads `config.select.labelled`: for each pair id, whether the pair counts in V.

    As in a run, a pair that was skipped, or whose responses are both bad, does not count in V; it is not picked again.

    Raises:
      ValueError: see `formats.read`; or a pair is not in the pool.
    """
    if not config.select.labelled:
        return {}
    path, known = pathlib.Path(config.select.labelled), set(pool.pair_ids)
    if path.suffix not in _LABELLED or not path.is_file():
        problem = "no such file" if path.suffix in _LABELLED else f"the suffix is {path.suffix!r}"
        raise ValueError(
            f"config.select.labelled={path}: {problem}; expected a file of labels ({', '.join(_LABELLED[:-1])}), or "
            "of pair ids, one a line (.txt)"
        )
    expected = f"the id of a pair of config.data.train={config.data.train}"
    if path.suffix == ".txt":
        try:
            lines = [line.rstrip("\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]
        except UnicodeDecodeError as error:
            fail(str(path), f"this is not UTF-8 ({error})", "pair ids in UTF-8", "save the file in UTF-8")
        for number, line in enumerate(lines, start=1):
            if line and line not in known:
                problem = f"there is no pair {line!r} in the pool"
                fail(f"{path}:{number}", problem, expected, "correct or delete the line")
        return {line: True for line in lines if line}
    found = verdicts(formats.read(path, known))
    return {name: verdict.label.preference in ("first", "second", "tie") for name, verdict in found.items()}


def check_budget(config: ml_collections.ConfigDict, pool: Candidates, labelled: Mapping[str, bool]) -> None:
    left = pool.num_pairs - len(labelled)
    if config.select.budget > left:
        raise ValueError(
            f"config.select.budget: got {config.select.budget}, but of the {pool.num_pairs} pairs of the pool "
            f"{len(labelled)} are labelled; expected at most {left}: lower it, or give more pairs"
        )


def described(config: ml_collections.ConfigDict, pool: Candidates) -> dict[str, Any]:
    """What `inputs.hold` compares when the command is repeated."""
    found: dict[str, Any] = {}
    if isinstance(pool, PairPool):
        found = {"pool": inputs.describe_pool(pool, config.data.train), **start.fingerprints(config)}
    else:
        texts = (json.dumps(files.plain(shown(pool, row))).encode() for row in range(pool.num_pairs))
        contents = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
        found["pool"] = inputs.describe_records(pool.pair_ids, contents, config.data.train)
    for name in ("features", "labelled"):
        if config.select[name]:
            content = pathlib.Path(config.select[name]).read_bytes()
            found[name] = hashlib.blake2b(content, digest_size=8).hexdigest()
    return found


def shown(pool: Candidates, row: int) -> dict[str, Any]:
    """A pair as people see it."""
    group, first, second = pool.pairs[row].tolist()
    responses = pool.response_texts[group]
    return {
        "pair_id": pool.pair_ids[row],
        "prompt": pool.prompt_texts[group],
        "first": responses[first],
        "second": responses[second],
    }


def rank(
    config: ml_collections.ConfigDict,
    folder: pathlib.Path,
    pool: Candidates,
    labelled: Mapping[str, bool],
    given: np.ndarray | None,
    tokenizer: Any,
) -> None:
    """Picks pairs and writes `ranked.jsonl`.

    Args:
      labelled: for each labelled pair, whether it counts in V.
      given: features [N, D]; None: the model computes the evidence.

    Raises:
      ValueError: the model cannot be loaded, or evidence is not finite.
    """
    strategy, selection, mesh = strategies.get(config.strategies[0]), config.selection, layout.make_mesh(config.mesh)
    evidence = {}
    if given is not None:
        evidence["features"] = given
    elif strategy.needs:
        assert isinstance(pool, PairPool)
        evidence = api.evidence(api.load(config, mesh, tokenizer), pool, strategy.name)
        for name, values in evidence.items():
            host.check_finite(values, f"{name} of config.model.path={config.model.path}")
    available = np.array([name not in labelled for name in pool.pair_ids])
    counted = np.array([labelled.get(name, False) for name in pool.pair_ids])
    known = np.asarray(pair_vectors(evidence[strategy.design][counted])) if strategy.design else None
    query = host.Query(
        strategy,
        config.select.budget,
        float(selection.lam),
        selection.block,
        config.seeds[0],
        float(selection.width_scale),
        config.select.in_blocks,
    )
    seen = {**evidence, "groups": pool.pairs[:, 0], "responses": np.sort(pool.pairs[:, 1:], axis=1)}
    choice = host.choose(query, seen, available, known, mesh)

    if choice.fallback:
        print(f"{strategy.name}: {strategy.falls_back}: picked at random")
    if choice.lam > np.float32(selection.lam):
        print(
            f"config.selection.lam={selection.lam} is below what float32 resolves for these features; "
            f"{choice.lam:.3g} is used, and scores and gains are those under it"
        )
    by_score, name = strategy.ranks and not choice.fallback, "random" if choice.fallback else strategy.name
    lines = []
    for place, (row, score) in enumerate(zip(choice.rows.tolist(), choice.scores.tolist(), strict=True), start=1):
        fields = {"rank": place, **shown(pool, row), "score": score if by_score else None}
        fields |= {"information_gain": None if choice.information_gain is None else float(np.log1p(score))}
        lines.append(json.dumps(files.plain({**fields, "strategy": name}), ensure_ascii=False) + "\n")
    files.write_atomic(folder / _RANKED, "".join(lines))


def read_ranked(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of `ranked.jsonl`.

    Raises:
      ValueError: a line is not one that `rank` writes; names file and line.
    """
    rows = []
    for number, line in enumerate(files.read_lines(path), start=1):
        try:
            row = json.loads(line)
            question(row)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: not a ranked pair ({error}); restore the file") from error
        rows.append(row)
    return rows


def question(row: Mapping[str, Any]) -> Question:
    """The question of a line of `ranked.jsonl`."""
    return Question(row["pair_id"], row["prompt"], row["first"], row["second"], row["score"], round=1)


def write_label_files(folder: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes every label format; existing files are kept, with the answers that people have filled in."""
    with tempfile.TemporaryDirectory() as place:
        formats.write(pathlib.Path(place), [question(row) for row in rows])
        for path in sorted(pathlib.Path(place).iterdir()):
            if not (folder / path.name).exists():
                files.write_atomic(folder / path.name, path.read_bytes())


def summary(rows: Sequence[Mapping[str, Any]], num_pairs: int, num_labelled: int, folder: pathlib.Path) -> str:
    gains = [row["information_gain"] for row in rows if row["information_gain"] is not None]
    gain = f", information gain {sum(gains):.2f} nats" if gains else ""
    before = f" ({num_labelled} labelled before)" if num_labelled else ""
    return (
        f"{len(rows)} of {num_pairs} pairs{before} picked by {rows[0]['strategy']}{gain}: {folder / _RANKED}; fill in "
        f"{folder / 'pairs.csv'}, or import a file beside it into a labelling tool"
    )


if __name__ == "__main__":
    main()
