"""What a decoder is made of, as one frozen description that every other module reads."""

import dataclasses

from activedpo_jax.config import LINEAR_MAPS


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary frequencies (``rope_type: llama3`` in Hugging Face configs)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embeddings (Su et al. 2021)."""

    theta: float = 10_000.0
    factor: float = 1.0  # positions are divided by it (``rope_type: linear``)
    scaling: RopeScaling | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a decoder is made of.  Field names are those of the papers; `huggingface.families` maps Hugging Face's onto
    them.

    Raises:
      ValueError: sizes do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str = "silu"  # of the gated feed-forward map: silu, gelu_tanh
    tie_embeddings: bool = True
    scale_embeddings: bool = False  # inputs are multiplied by √hidden_size
    qkv_bias: bool = False

    norms: str = "pre"  # around attention and feed-forward map: pre, post (of their outputs), both
    qk_norm: str = "none"  # of queries and keys before they are rotated: none, head (each head), width (all heads)
    rms_norm_eps: float = 1e-5
    norm_offset: float = 0.0  # norms multiply by offset + scale

    query_scale: float | None = None  # of queries before the scores; None: 1/√head_dim
    attention_softcap: float | None = None  # c: scores become c·tanh(scores/c)
    logit_softcap: float | None = None

    rope: Rope = Rope()
    unrotated: tuple[bool, ...] = ()  # which layers have no rotary embedding; empty: none
    window: int | None = None  # tokens that a token sees in local layers, itself included
    local: tuple[bool, ...] = ()  # which layers are local; empty: all if there is a window, else none
    local_rope: Rope | None = None  # of local layers; None: as in the others

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}: "
                "in grouped-query attention each key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings rotate pairs of channels")
        for name in ("unrotated", "local"):
            if (given := len(getattr(self, name))) not in (0, self.num_layers):
                raise ValueError(f"{name} says something of {given} layers; expected all {self.num_layers}, or none")

    @property
    def is_local(self) -> tuple[bool, ...]:
        """Whether attention is limited to `window`, layer by layer."""
        if self.window is None:
            return (False,) * self.num_layers
        return self.local or (True,) * self.num_layers


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2021): W + scale·BA on each target module.

    `rslora` uses scale = alpha/√rank (Kalajdzievski 2023) in place of alpha/rank.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: tuple[str, ...] = LINEAR_MAPS
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
