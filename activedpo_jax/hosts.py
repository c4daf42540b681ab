"""Several processes, one run: how they find each other, and what passes between them.

Every process runs the same commands on the same data.  Process 0 alone writes, prints and asks people; the others get
what it read or was told.  With one process nothing here does anything.
"""

import functools
import hashlib
import os
import pickle
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from activedpo_jax.cluster import Address
from activedpo_jax.data.store import ALONE, Hosts

_P = ParamSpec("_P")
_T = TypeVar("_T")

HEARTBEAT_SECONDS = 60  # a process that says nothing for so long is dead, and the others end


def start(address: Address, source: str | None) -> None:
    """Joins the other processes, if there are any, and says who was found.  Call it before anything uses a device.

    Args:
      source: what says that there are several, from `cluster.detected`; None: this process is alone.

    Raises:
      ValueError: the others cannot be found, or do not answer.
    """
    if source is None:
        return
    # JAX's own service would take SIGTERM for itself; here every process looks for it where work can be saved.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(*address, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=20)
    except (RuntimeError, ValueError) as error:
        if source == "Cloud TPU" and "should be defined" in str(error):
            return  # a machine with a TPU of its own, and no others
        reason = " ".join(str(error).split())
        raise ValueError(
            f"several processes ({source}): they do not find each other ({reason}); start the same command on every "
            "host, with --coordinator=HOST:PORT --num_processes=N --process_id=I where nothing else says it"
        ) from error
    if several() and is_first():
        print(f"{jax.process_count()} processes ({source}), {jax.device_count()} devices", flush=True)
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)


def leave() -> None:
    """Waits for the others, and parts from them; a process that ends without it looks to them as if it had died."""
    if several():
        jax.distributed.shutdown()


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, which writes and prints."""
    return not several() or jax.process_index() == 0


_inside = threading.local()  # whether process 0 is within a function that the others do not run


def on_first(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Lets process 0 alone run a function; every process gets its result, or its error.

    All processes have to call it, in the same order.  Results travel as pickles between the processes of one run.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if not several() or getattr(_inside, "first", False):
            return function(*args, **kwargs)
        outcome: tuple[Any, Exception | None] = (None, None)
        if is_first():
            _inside.first = True
            try:
                outcome = function(*args, **kwargs), None
            except Exception as error:
                outcome = None, error
            finally:
                _inside.first = False
        result, raised = _broadcast(outcome)
        if raised is not None:
            raise raised
        return result

    return run


def _broadcast(outcome: Any) -> Any:
    """What process 0 has, on every process."""
    payload = np.zeros(0, np.uint8)
    if is_first():
        payload = np.frombuffer(pickle.dumps(outcome), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(payload))))
    if not is_first():
        payload = np.zeros(size, np.uint8)
    # The sum of the processes' arrays, of which only one is not zero.
    payload = np.asarray(multihost_utils.broadcast_one_to_all(payload)).astype(np.uint8)
    return outcome if is_first() else pickle.loads(payload.tobytes())


def exchange(part: np.ndarray) -> list[np.ndarray]:
    """The parts [n_p] uint8 of all processes, on every process, in the order of their numbers."""
    if not several():
        return [part]
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(part)))).reshape(-1)
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: len(part)] = part
    parts = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [row[:size] for row, size in zip(parts, sizes, strict=True)]


def readers() -> Hosts:
    """The processes, for preparing data together."""
    return Hosts(jax.process_index(), jax.process_count(), exchange) if several() else ALONE


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    if not several():
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def agree(what: str, values: Mapping[str, Any]) -> None:
    """Compares what every process has come to, and ends the run where they differ.

    Args:
      what: the values belong to, such as `round 3`.
      values: by name (`picks`, `adapter`): pytrees of arrays, or plain data.

    Raises:
      ValueError: they differ; names the value and the processes that differ from most.
    """
    if not several():
        return
    mine = {name: fingerprints(value) for name, value in values.items()}
    theirs = [pickle.loads(part.tobytes()) for part in exchange(np.frombuffer(pickle.dumps(mine), np.uint8))]
    for name in values:
        if odd := odd_ones_out([found[name] for found in theirs]):
            names = ", ".join(map(str, odd))
            raise ValueError(
                f"{what}: process {names} of {len(theirs)} has other {name} than the others; expected the same "
                "everywhere: give every host the same code, data, options and kind of device.  Nothing of this round "
                "was saved"
            )


def odd_ones_out(found: Sequence[Mapping[str, str]]) -> list[int]:
    """The processes whose fingerprints differ from those that most others have for the same parts.

    Args:
      found: of every process, by part: two processes need not hold the same parts of an array.
    """
    odd = set[int]()
    for part in {part for mine in found for part in mine}:
        holders = {process: mine[part] for process, mine in enumerate(found) if part in mine}
        counts: dict[str, int] = {}
        for fingerprint in holders.values():
            counts[fingerprint] = counts.get(fingerprint, 0) + 1
        usual = max(counts, key=lambda fingerprint: counts[fingerprint])  # of equals the first process's
        odd |= {process for process, fingerprint in holders.items() if fingerprint != usual}
    return sorted(odd)


def fingerprints(value: Any) -> dict[str, str]:
    """A fingerprint of every part of a tree that this process holds: whole arrays, or their shards by index."""
    found: dict[str, str] = {}
    for path, leaf in jax.tree.leaves_with_path(value):
        name = jax.tree_util.keystr(path)
        if isinstance(leaf, jax.Array):
            for shard in leaf.addressable_shards:
                where = ",".join(f"{s.start or 0}" for s in shard.index)
                key = f"{name}[{where}]"
                if key not in found:
                    found[key] = str(np.asarray(_checksum(shard.data)).tolist())
        else:
            data = leaf.tobytes() if isinstance(leaf, np.ndarray) else repr(leaf).encode()
            found[name] = hashlib.blake2b(data, digest_size=8).hexdigest()
    return found


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """Two sums over an array's bits, [2] uint32, computed where it lies."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).reshape(-1).astype(jnp.uint32)
    weights = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435761) | jnp.uint32(1)
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * weights, dtype=jnp.uint32)])
