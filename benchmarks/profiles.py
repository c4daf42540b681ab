"""Where the time of a JAX trace went: `python -m benchmarks.profiles TRACE_DIRECTORY`.

Lists kernels by their total time: on a GPU those of all its streams, on a CPU the operations of XLA's threads.
"""

import argparse
import collections
import pathlib
import re
import sys

from jax.profiler import ProfileData

_AROUND = ("end: ", "Threadpool", "ThunkExecutor", "SlinkyThreadPool")  # events of XLA's threads that are no operations


def kernels(directory: pathlib.Path) -> dict[str, tuple[float, int]]:
    """Seconds and number of calls of each kernel in a trace, numbers at the end of its name left out."""
    files = sorted(directory.rglob("*.xplane.pb"))
    if not files:
        sys.exit(f"{directory}: no *.xplane.pb in it; expected what `--profile` or `jax.profiler.trace` has written")
    seconds: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    planes = list(ProfileData.from_file(str(files[-1])).planes)
    on_device = [p for p in planes if p.name.startswith("/device:") and any(line.events for line in p.lines)]
    for plane in on_device or planes:
        for line in plane.lines:
            if not line.name.startswith("Stream" if on_device else "tf_XLA"):
                continue
            for event in line.events:
                name = re.sub(r"[._]\d+$", "", event.name)
                if name.startswith(_AROUND):
                    continue
                seconds[name] += event.duration_ns / 1e9
                calls[name] += 1
    return {name: (total, calls[name]) for name, total in seconds.most_common()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--top", type=int, default=30)
    args = parser.parse_args()
    found = kernels(args.directory)
    total = sum(seconds for seconds, _ in found.values())
    print(f"{total:.4f} s in all")
    for name, (seconds, calls) in list(found.items())[: args.top]:
        print(f"{seconds:>10.4f} s {seconds / total:>6.1%} {calls:>7} calls  {name[:110]}")


if __name__ == "__main__":
    main()
