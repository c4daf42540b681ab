"""Time and host memory of a large pool: read, tokenised, described, sorted into buckets, and passed over in batches.

    python -m benchmarks.pool --pairs 1000000 --out benchmarks/results/pool_cpu.json [--against CHECKOUT]

The pool is generated in a temporary folder: short prompts with two short responses each, and the tests' small
tokenizer with a chat template.  A fresh process works on it and prints, for each stage, the seconds and the peak of its
resident memory beyond its size after the imports: what it allocated, and what of files it had mapped (which the system
takes back when it needs the memory).  With `--against` it does the same with the code of another checkout, such as an
earlier commit's.
"""

import argparse
import ctypes
import gc
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

BUCKETS = ((64, 64), (128, 128))
CHUNK = 64  # groups in a padded batch
_WORDS = ["What", "colour", "is", "the", "sky", "today", "It", "blue", "and", "grass", "green", "not", "so", "much"]

_Result = TypeVar("_Result")


def write_pool(path: pathlib.Path, pairs: int, words: int) -> None:
    """JSONL of different prompts, each with two different responses, all of `words` words at most."""
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(_WORDS, rng.integers(words // 3, words + 1))) for _ in range(4096)]
    with open(path, "w") as file:
        for i in range(pairs):
            prompt, chosen, rejected = (sentences[j] for j in rng.integers(0, len(sentences), 3))
            row = {"prompt": f"{i} {prompt}?", "chosen": f"{chosen}.", "rejected": f"{rejected}, not."}
            file.write(json.dumps(row) + "\n")


def resident() -> tuple[int, int]:
    """Bytes of this process in memory: allocated, and mapped from files."""
    status = pathlib.Path("/proc/self/status").read_text()
    found = {name: 1024 * int(size) for name, size in re.findall(r"^(Rss\w+):\s+(\d+) kB", status, re.MULTILINE)}
    return found["RssAnon"], found["RssFile"] + found["RssShmem"]


class Meter:
    """Runs stages, and keeps the seconds and the peaks of each."""

    def __init__(self) -> None:
        self.base, self.stages = resident(), dict[str, dict[str, float]]()

    def __call__(self, name: str, work: Callable[[], _Result]) -> _Result:
        peaks, done = [0, 0], threading.Event()

        def look() -> None:
            peaks[:] = map(max, peaks, (now - base for now, base in zip(resident(), self.base, strict=True)))

        def watch() -> None:
            while not done.wait(0.02):
                look()

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
        look()
        self.stages[name] = {"seconds": seconds, "allocated_peak": peaks[0], "mapped_peak": peaks[1]}
        return result


def work_on(source: str) -> dict[str, Any]:
    """All stages in this process, which should be a fresh one."""
    from activedpo_jax.data import groups, tokenize
    from activedpo_jax.record import inputs
    from tests.tiny_tokenizer import CHATML, make_tokenizer

    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    buckets, longest = [groups.Bucket(*b) for b in BUCKETS], BUCKETS[-1]
    try:
        from activedpo_jax.data.encoding import make_encoding
        from activedpo_jax.data.records import read_records

        def tokenised(records: Any) -> groups.PairPool:
            return tokenize.encoded_pool(records, make_encoding(tokenizer, "chat", *longest), 0)
    except ImportError:  # of a checkout before there were those files
        from activedpo_jax.data.preferences import read_records  # type: ignore[attr-defined, no-redef]

        def tokenised(records: Any) -> groups.PairPool:
            return tokenize.tokenize(records, tokenizer, "chat", *longest, 0)  # type: ignore[attr-defined]

    try:
        from activedpo_jax.data.batches import parts

        def cut(bucket_of: Any) -> Any:
            return ((part.bucket, part.places) for part in parts(bucket_of, buckets, 2, (CHUNK,)))
    except ImportError:  # likewise

        def cut(bucket_of: Any) -> Any:
            return groups.microbatches(bucket_of, CHUNK)  # type: ignore[attr-defined]

    tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)  # imports what it needs
    meter = Meter()

    def read_and_tokenise() -> groups.PairPool:
        records = meter("read and check", lambda: read_records(source))
        return meter("tokenise", lambda: tokenised(records))

    pool = read_and_tokenise()
    meter("describe for the record", lambda: inputs.describe_pool(pool, source))
    meter("check tokens", lambda: groups.check_tokens(pool, len(tokenizer), source))
    bucket_of = meter("assign buckets", lambda: groups.assign_buckets(pool, buckets))
    meter("ids to rows for selection", lambda: pool.digests)

    def one_pass() -> None:
        for b, rows in cut(bucket_of):
            groups.pad_groups(pool, rows, buckets[b], CHUNK)

    meter("one pass of padded batches", one_pass)
    tokens = sum(map(len, pool.prompt_tokens)) + sum(len(r) for several in pool.response_tokens for r in several)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    held = resident()[0] - meter.base[0]
    return {"stages": meter.stages, "held": held, "pairs": pool.num_pairs, "tokens": tokens}


def in_fresh_process(source: pathlib.Path, checkout: pathlib.Path) -> dict[str, Any]:
    """What `work_on` finds, with the code of a checkout."""
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--source", str(source)]
    environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(name: str, found: dict[str, Any]) -> str:
    pairs = found["pairs"]
    lines = [f"{name}: {pairs:,} pairs, {found['tokens'] / pairs:.0f} tokens a pair"]
    lines.append(f"  {'':<28}{'seconds':>9}{'allocated':>12}{'a pair':>10}{'mapped':>12}")
    for stage, row in found["stages"].items():
        allocated, mapped = row["allocated_peak"], row["mapped_peak"]
        lines.append(
            f"  {stage:<28}{row['seconds']:>9.1f}{allocated / 2**20:>8.0f} MiB{allocated / pairs:>8.0f} B"
            f"{mapped / 2**20:>8.0f} MiB"
        )
    lines.append(f"  {'held at the end':<28}{'':>9}{found['held'] / 2**20:>8.0f} MiB{found['held'] / pairs:>8.0f} B")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--words", type=int, default=24, help="the most words of a prompt or a response")
    parser.add_argument("--against", type=pathlib.Path, help="a checkout whose code is measured, too")
    parser.add_argument("--against_pairs", type=int, default=20_000, help="pairs that both are compared on")
    parser.add_argument("--out", type=pathlib.Path, help="write the figures here, as JSON")
    parser.add_argument("--source", help=argparse.SUPPRESS)  # in the process that is measured
    args = parser.parse_args()
    if args.source:
        print(json.dumps(work_on(args.source)))
        return
    here = pathlib.Path(__file__).resolve().parents[1]
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.against:
            source = pathlib.Path(folder) / "some.jsonl"
            write_pool(source, args.against_pairs, args.words)
            for name, checkout in (("the other checkout", args.against.resolve()), ("this one", here)):
                runs[name] = in_fresh_process(source, checkout)
                print(table(name, runs[name]), flush=True)
        source = pathlib.Path(folder) / "pool.jsonl"
        write_pool(source, args.pairs, args.words)
        runs["all"] = in_fresh_process(source, here) | {"file_bytes": source.stat().st_size}
        print(table("all", runs["all"]))
    if args.out:
        import jax
        import transformers

        hardware = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        versions = {"python": platform.python_version(), "numpy": np.__version__, "jax": jax.__version__}
        versions["transformers"] = transformers.__version__
        arguments = {
            "pairs": args.pairs,
            "words": args.words,
            "against_pairs": args.against_pairs if args.against else 0,
        }
        record = {"hardware": hardware, "versions": versions, "arguments": arguments, "runs": runs}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
