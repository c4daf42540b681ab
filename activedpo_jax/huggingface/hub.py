"""Where Hugging Face files are: in a directory here, or on the Hub."""

import pathlib
from collections.abc import Sequence

import huggingface_hub


def named(path: str, revision: str) -> str:
    return f"{path} (revision {revision})" if revision else path


def refuse_missing_directory(path: str, what: str, option: str) -> None:
    """A Hub name is `name` or `owner/name`; anything else that is not a directory is a directory misspelt.

    Raises:
      ValueError: `path` is such a one; `what` was expected there, and `option`.path says where.
    """
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1
    if looks_local and not pathlib.Path(path).is_dir():
        raise ValueError(f"{path}: no such directory; expected {what}: set {option}.path")


def fetch(path: str, revision: str, patterns: Sequence[str], what: str, option: str) -> pathlib.Path:
    """The directory of a model or an adapter: `path` itself, or the Hub's files that match, downloaded unless cached.

    Args:
      path: a directory, or a name on the Hub.
      revision: branch, tag or commit on the Hub; empty: the default branch.
      what, option: what is expected there, and which group of options has its `path` and `revision`.

    Raises:
      ValueError: there is nothing of the name; in offline mode: nothing in the cache.
    """
    refuse_missing_directory(path, what, option)
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
