"""The policy π_θ and its reference: one set of base weights, and an adapter for each of the two."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from activedpo_jax.data.groups import Groups
from activedpo_jax.data.packing import Packing
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "reference"], meta_fields=["decoder"])
@dataclasses.dataclass(frozen=True)
class Policy:
    """What stays the same in all rounds of a run; a pytree whose decoder is static.

    π_θ is the base model with the adapter θ of the run's state; π_ref is the base model with `reference`, the adapter
    that the run starts from.  A fresh one has B = 0, so that π_ref is the base model exactly; one that SFT has trained
    makes it the SFT model.
    """

    decoder: Decoder
    params: Params
    reference: Lora

    def packed(self, packing: Packing | None) -> "Policy":
        """The policy that scores groups so packed; None: padded."""
        return dataclasses.replace(self, decoder=self.decoder.clone(packing=packing))


def response_logps(decoder: Decoder, params: Params, lora: Lora | None, groups: Groups) -> jax.Array:
    """log π_θ(y|x), summed over the response's tokens: [G, m] float32; `lora=None`: of the base weights."""
    variables = {"params": params} if lora is None else {"params": params, "lora": lora}
    return jnp.sum(decoder.apply(variables, groups), axis=-1)  # type: ignore[arg-type]
