"""What a user names in the config as `module:name`."""

import importlib
from typing import Any


def load(name: str, option: str) -> Any:
    """What `module:name` names.

    Raises:
      ValueError: there is no such module, or nothing of that name in it; says which option to change.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option}: {name!r} cannot be had ({error}); expected module:function, importable") from error
