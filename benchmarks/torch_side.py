"""The other side: what one writes in PyTorch with transformers and PEFT, on the weights of a decoder."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers

from activedpo_jax.huggingface import families
from activedpo_jax.models import sketch
from activedpo_jax.models.decoder import Decoder, Params
from activedpo_jax.models.lora import Lora

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Rows(NamedTuple):
    """Responses with a prompt of their own each, padded on the right."""

    ids: torch.Tensor  # [B, T] int64
    attended: torch.Tensor  # [B, T] int64, 0 at padding
    completed: torch.Tensor  # [B, T] int64, 1 at tokens of the response

    def log_probs(self, causal: Any) -> torch.Tensor:
        """[B] float32, with logits at the responses' tokens alone.

        Padding comes last, where causal attention does not look, so that no mask keeps attention from its fast kernel.
        """
        states = self.hidden(causal, causal.get_input_embeddings()(self.ids))
        return self.of_states(causal, states)

    def hidden(self, causal: Any, embedded: torch.Tensor) -> torch.Tensor:
        return causal.model(inputs_embeds=embedded).last_hidden_state

    def of_states(self, causal: Any, states: torch.Tensor) -> torch.Tensor:
        wanted = self.completed[:, 1:].bool()
        logits = causal.lm_head(states[:, :-1][wanted]).float()
        logps = -torch.nn.functional.cross_entropy(logits, self.ids[:, 1:][wanted], reduction="none")
        return torch.zeros(len(self.ids), device=logps.device).index_add(0, torch.nonzero(wanted)[:, 0], logps)


def rows(texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Rows:
    """Of prompts and responses."""
    width = max(len(prompt) + len(response) for prompt, response in texts)
    ids, attended, completed = (np.zeros((len(texts), width), np.int64) for _ in range(3))
    for i, (prompt, response) in enumerate(texts):
        end = len(prompt) + len(response)
        ids[i, :end] = np.concatenate([prompt, response])
        attended[i, :end], completed[i, len(prompt) : end] = 1, 1
    return Rows(*(torch.from_numpy(x).to(DEVICE) for x in (ids, attended, completed)))


def _tensor(x: jax.Array) -> torch.Tensor:
    return torch.from_dlpack(x)


def peft_model(
    config: dict[str, Any],
    decoder: Decoder,
    params: Params,
    lora: Lora,
    float32_adapter: bool,
    attention: str = "sdpa",
) -> Any:
    """A PEFT model with the same base weights, of which there is one copy on a GPU, and a copy of the adapter.

    Args:
      config: what the decoder's was made from.
    """
    dtype = getattr(torch, jnp.dtype(decoder.dtype).name)
    hf_config = transformers.AutoConfig.for_model(**config)
    with DEVICE:
        base = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation=attention)
        spec = decoder.lora
        adapter = peft.LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.target_modules))
        model = peft.get_peft_model(base, adapter, autocast_adapter_dtype=float32_adapter)
    weights = families.family(config).weights
    theirs = dict(base.named_parameters())
    with torch.no_grad():
        for path, leaf in jax.tree.leaves_with_path(params):
            weight, tensor = weights[tuple(k.key for k in path)], _tensor(leaf)
            stacked = "{layer}" in weight.name
            for layer, x in enumerate(tensor if stacked else [tensor]):
                full = weight.name.format(layer=layer)
                linear = re.sub(r"_proj\.(weight|bias)$", r"_proj.base_layer.\1", full)
                theirs[linear if linear in theirs else full].data = x.T if weight.transposed else x
        for module, matrices in lora["layers"].items():
            for leaf_name, stack in matrices.items():
                for layer, x in enumerate(_tensor(stack)):
                    linear = families.LINEAR_MAPS[module].format(layer=layer)
                    theirs[f"{linear}.lora_{leaf_name.upper()}.default.weight"].copy_(x)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()  # of the random weights that are replaced
    return model


class Sketch:
    """`models.sketch.tiled_count_sketch` in PyTorch: the same signs and offsets, both made once."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.known: dict[tuple[int, str], tuple[Any, ...]] = {}

    def _randomness(self, layer: int, name: str, size: int) -> tuple[Any, ...]:
        if (layer, name) not in self.known:
            tiles = size // self.dim + 1
            words = sketch._random_words(jnp.uint32(0), jnp.int32(layer), name, -(-size // 32) + tiles)
            signs = torch.from_numpy(np.array(sketch._signs(words[tiles:])[:size])).to(DEVICE)
            offsets = np.asarray(words[:tiles]) % self.dim
            if DEVICE.type == "cpu":
                self.known[layer, name] = signs, offsets.tolist()
            else:  # the loop over tiles launches too many kernels
                shift = torch.from_numpy(offsets.astype(np.int64)).to(DEVICE)[:, None]
                places = torch.arange(tiles, device=DEVICE)[:, None] * self.dim
                entries = places + (torch.arange(self.dim, device=DEVICE) - shift) % self.dim
                inside = entries < size
                entries = entries.clamp(max=size - 1)
                self.known[layer, name] = torch.where(inside, signs[entries], 0), entries.flatten().int()
        return self.known[layer, name]

    def add(self, total: torch.Tensor, gradients: torch.Tensor, layer: int, name: str) -> None:
        """Adds the sketch of gradients [B, rows, columns] to total [B, D]."""
        flat = gradients.flatten(1).float()
        signs, found = self._randomness(layer, name, flat.shape[1])
        if DEVICE.type != "cpu":
            gathered = flat.index_select(1, found).view(len(flat), *signs.shape)
            total += torch.einsum("btd,td->bd", gathered, signs)
            return
        signed = flat * signs
        for k, offset in enumerate(found):
            tile = signed[:, k * self.dim : (k + 1) * self.dim]
            before = min(tile.shape[1], self.dim - offset)
            total[:, offset : offset + before] += tile[:, :before]
            total[:, : tile.shape[1] - before] += tile[:, before:]


def _done(x: torch.Tensor) -> torch.Tensor:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return x


def _pairs(total: torch.Tensor) -> torch.Tensor:
    """Features [G, D] with `response` normalisation from the sketches [2G, D] of neighbours."""
    unit = torch.nn.functional.normalize(total, dim=1).view(-1, 2, total.shape[1])
    return unit[:, 0] - unit[:, 1]


_LORA = re.compile(r"layers\.(\d+)\.\w+\.(\w+)\.lora_(A|B)\.default")


def hooks(model: Any, batches: Sequence[Rows], dim: int) -> Callable[[], torch.Tensor]:
    """Features [G, D] from batched hooks: outer products of activations and output gradients, and our sketch.

    No gradient of any weight is computed, so this is the least that PyTorch has to do for rows.
    """
    model.requires_grad_(False)
    causal = model.get_base_model()
    projection = Sketch(dim)
    state: dict[str, torch.Tensor] = {}

    def watch(module: Any, layer: int, name: str) -> None:
        def forward(module: Any, inputs: Any, output: Any) -> None:
            x = inputs[0].detach()

            def backward(d: torch.Tensor) -> None:
                projection.add(state["total"], torch.einsum("bto,bti->boi", d, x), layer, name)

            output.register_hook(backward)

        module.register_forward_hook(forward)

    for path, module in model.named_modules():
        if found := re.search(_LORA.pattern + "$", path):
            watch(module, int(found[1]), f"{found[2]}/{found[3].lower()}")

    def run() -> torch.Tensor:
        sketches = []
        for batch in batches:
            state["total"] = torch.zeros(len(batch.ids), dim, device=DEVICE)
            embedded = causal.get_input_embeddings()(batch.ids).requires_grad_()
            torch.autograd.grad(batch.of_states(causal, batch.hidden(causal, embedded)).sum(), embedded)
            sketches.append(state["total"])
        return _done(_pairs(torch.cat(sketches)))

    return run


def vmap_of_grad(model: Any, batches: Sequence[Rows], dim: int) -> Callable[[], torch.Tensor]:
    """Features [G, D] from `torch.func.vmap(grad)` and our sketch."""
    causal = model.get_base_model()
    projection = Sketch(dim)
    weights = {name: p.detach() for name, p in causal.named_parameters() if "lora_" in name}
    rest = {name: p.detach() for name, p in causal.named_parameters() if "lora_" not in name}

    def log_prob(weights: Any, ids: torch.Tensor, completed: torch.Tensor) -> torch.Tensor:
        out = torch.func.functional_call(causal, rest | weights, (), {"input_ids": ids[None], "use_cache": False})
        logps = torch.log_softmax(out.logits[0, :-1].float(), -1)
        return (logps.gather(1, ids[1:, None])[:, 0] * completed[1:]).sum()

    gradients = torch.func.vmap(torch.func.grad(log_prob), in_dims=(None, 0, 0))

    def run() -> torch.Tensor:
        sketches = []
        for batch in batches:
            total = torch.zeros(len(batch.ids), dim, device=DEVICE)
            for path, gradient in gradients(weights, batch.ids, batch.completed).items():
                found = re.search(_LORA.pattern, path)
                assert found is not None
                projection.add(total, gradient, int(found[1]), f"{found[2]}/{found[3].lower()}")
            sketches.append(total)
        return _done(_pairs(torch.cat(sketches)))

    return run


def one_at_a_time(model: Any, batches: Sequence[Rows], project_to: int | None) -> Callable[[], torch.Tensor]:
    """Features [G, n] of one response after the other, gradients flattened.

    Args:
      project_to: by traker's BasicProjector, all at the end; None: they stay as they are.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    causal = model.get_base_model()
    projector = None
    if project_to is not None:
        from trak.projectors import BasicProjector, ProjectionType

        size = sum(p.numel() for p in weights)
        projector = BasicProjector(size, project_to, 0, ProjectionType.rademacher, DEVICE)

    def run() -> torch.Tensor:
        flat = []
        for batch in batches:
            for ids, attended, completed in zip(*batch, strict=True):
                row = Rows(*(x[: int(attended.sum())][None] for x in (ids, attended, completed)))
                gradient = torch.autograd.grad(row.log_probs(causal).sum(), weights)
                flat.append(torch.cat([g.flatten() for g in gradient]).float())
        found = torch.stack(flat)
        if projector is not None:  # all at once, since it makes its random matrix anew for every call
            found = projector.project(found, model_id=0)
        return _done(_pairs(found))

    return run


def greedy(features: torch.Tensor, count: int, lam: float) -> np.ndarray:
    """Rows picked for the largest log det(λI + Σ φφᵀ), from the Gram matrix, as pivoted Cholesky."""
    left = (features @ features.T / lam).double()
    rows: list[int] = []
    for _ in range(count):
        scores = torch.diagonal(left).clone()
        scores[rows] = -torch.inf
        rows.append(int(scores.argmax()))
        picked = left[rows[-1]]
        left = left - torch.outer(picked, picked) / (1 + picked[rows[-1]])
    return np.array(rows)
