"""ActiveDPO (arXiv 2505.19241) in JAX: the model being aligned chooses the preference labels it needs.

The commands are in the README.  For notebooks, and for those who train elsewhere, there are

    load_model    a Hugging Face model with an adapter
    read_pool     pairs of responses from dicts, a `datasets.Dataset` or a file
    features      φ of every pair, [N, D]
    choose        which of them to label

which `activedpo_jax.api` defines; importing this package alone imports neither it nor JAX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from activedpo_jax.api import Choice, Model, choose, features, load_model, read_pool

__version__ = "0.1.0"
__all__ = ["Choice", "Model", "choose", "features", "load_model", "read_pool"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; there are {', '.join(__all__)}")
    from activedpo_jax import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
