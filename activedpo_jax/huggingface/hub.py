"""Hugging Face files: in a local directory, or on the Hub."""

import hashlib
import pathlib
from collections.abc import Sequence

import huggingface_hub

from activedpo_jax.files import on_disk
from activedpo_jax.remote import is_remote


def named(path: str, revision: str) -> str:
    return f"{path} (revision {revision})" if revision else path


def refuse_missing_directory(path: str, expected: str, option: str) -> None:
    """Refuses a misspelt directory: a path that is not one, and not a Hub name (`name` or `owner/name`) either.

    Raises:
      ValueError: `path` is one; says what was expected there, and that `option`.path gives it.
    """
    if is_remote(path):
        return
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1
    if looks_local and not pathlib.Path(path).is_dir():
        raise ValueError(f"{path}: no such directory; expected {expected}: set {option}.path")


def fetch(path: str, revision: str, patterns: Sequence[str], expected: str, option: str) -> pathlib.Path:
    """The directory of a model or an adapter: `path` itself, or the Hub's files that match, downloaded unless cached.

    Args:
      path: a directory, or a name on the Hub.
      revision: branch, tag or commit on the Hub; empty: the default branch.
      expected, option: what the path should hold, and the group of options with its `path` and `revision`.

    Raises:
      ValueError: nothing has this name, in offline mode nothing in the cache.
    """
    if is_remote(path):  # what SFT has left in a work directory there
        return on_disk(path)
    refuse_missing_directory(path, expected, option)
    if pathlib.Path(path).is_dir():
        return pathlib.Path(path)
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(path, revision=revision or None, allow_patterns=list(patterns))
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{named(path, revision)}: neither a directory here, nor to be had from the Hugging Face Hub: "
            f"set {option}.path or {option}.revision ({type(error).__name__}: {error})"
        ) from error


_FINGERPRINTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
_BLOCK_BYTES, _BLOCKS = 1 << 16, 1024  # of a larger file, only this many evenly spread blocks are read


def fingerprint(path: str, revision: str) -> str:
    """What identifies a model's or an adapter's files: a digest, or the commit in the Hub's cache.

    Files of up to 64 MiB are read whole.  For larger ones the digest covers the size and 1,024 evenly spread blocks,
    the first of which holds the header of a safetensors file: another training changes all of the others.

    Args:
      path, revision: as in `fetch`; the files must be local or cached.
    """
    folder = on_disk(path)
    if not folder.is_dir():
        snapshot = huggingface_hub.try_to_load_from_cache(path, "config.json", revision=revision or None)
        if not isinstance(snapshot, str):
            snapshot = huggingface_hub.try_to_load_from_cache(path, "adapter_config.json", revision=revision or None)
        return pathlib.Path(snapshot).parent.name if isinstance(snapshot, str) else revision
    state = hashlib.blake2b(digest_size=16)
    for file in sorted({file for pattern in _FINGERPRINTED for file in folder.glob(pattern)}):
        size = file.stat().st_size
        state.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as opened:
            if size <= _BLOCK_BYTES * _BLOCKS:
                state.update(opened.read())
                continue
            for block in range(_BLOCKS):
                opened.seek(block * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
                state.update(opened.read(_BLOCK_BYTES))
    return state.hexdigest()
