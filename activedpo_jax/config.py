"""The one table of options: default, comment, and what the values may be.  A file in `configs/` changes some of them,
and is a run's record."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections

# The linear maps of a decoder's layer, which LoRA can target, under PEFT's names.
LINEAR_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Rule(NamedTuple):
    """What the values of an option must satisfy."""

    holds: Callable[[Any], bool]
    words: str


def between(low: float, high: float) -> Rule:
    return Rule(lambda value: low <= value <= high, f"a number from {low:,} to {high:,}")


def _distinct(value: tuple[Any, ...]) -> bool:
    return len(value) > 0 and len(set(value)) == len(value)


ANYTHING = Rule(lambda value: True, "")
POSITIVE = Rule(lambda value: value > 0, "a number above 0")
NOT_NEGATIVE = Rule(lambda value: value >= 0, "0 or more")
SHARE = between(0, 1)
AXIS = Rule(lambda value: value > 0 or value == -1, "a number of devices, or -1 for all that are left")
EXAMPLES = between(1, 2**20)  # of a batch, a chunk or a data set: arrays are made for so many
TOKENS = between(1, 2**20)
RESPONSES = between(2, 1024)  # of which pairs are made
NAMES = Rule(_distinct, "one name or more, each once")
SEEDS = Rule(
    lambda value: _distinct(value) and min(value) >= 0 and max(value) < 2**32,
    "one number or more, each once, from 0 to below 2**32",
)
MODULES = Rule(
    lambda value: _distinct(value) and set(value) <= set(LINEAR_MAPS), f"some of {', '.join(LINEAR_MAPS)}, each once"
)
BUCKETS = Rule(
    lambda value: _distinct(value) and all(len(pair) == 2 and all(map(TOKENS.holds, pair)) for pair in value),
    "pairs of (prompt, response) tokens such as ((128, 128), (256, 512)), each once and up to 1,048,576 tokens",
)


@dataclasses.dataclass(frozen=True)
class Option:
    default: Any  # values have its type; an option of a float takes whole numbers too
    comment: str
    own_rule: Rule | None = None
    choices: tuple[str, ...] = ()
    registry: str = ""  # `module:NAME` of a dict whose keys are the choices

    @property
    def names(self) -> tuple[str, ...]:
        """The choices; empty: there is no list of them.  A registry is imported only now: this file is below it."""
        if not self.registry:
            return self.choices
        module, _, name = self.registry.partition(":")
        return tuple(getattr(importlib.import_module(module), name))

    @property
    def rule(self) -> Rule:
        """A number without a rule of its own is above 0."""
        return self.own_rule or (POSITIVE if type(self.default) in (int, float) else ANYTHING)


_SCHEDULES = ("linear", "cosine", "constant")

# Where the paper fixes a value, that is the default (arXiv 2505.19241, section 5).
OPTIONS: dict[str, Option] = {
    # Several strategies or seeds get a folder each, `<strategy>/seed<seed>/`, and a comparison at the top.
    "strategies": Option(
        ("activedpo",), "how pairs are picked; module:function is your own; each runs on every seed", NAMES
    ),
    "seeds": Option((0,), "of everything that is drawn", SEEDS),
    "rounds": Option(10, "of picking, labelling and training"),
    "labels_per_round": Option(50, "K"),
    "checkpoint_minutes": Option(
        5.0, "that a kill may cost at most, of any stage; 0: save after every step", NOT_NEGATIVE
    ),
    # The model
    "model.path": Option("", "a Hugging Face directory or Hub name; empty: the synthetic task's own tiny decoder"),
    "model.revision": Option("", "Hub branch, tag or commit; empty: the default branch"),
    "model.dtype": Option(
        "auto", "base weights and compute; auto: float32 on CPU, else bfloat16", choices=("auto", "float32", "bfloat16")
    ),
    "model.quantisation": Option(
        "none", "base weights of the linear maps (pip install '.[quant]')", choices=("none", "int8", "nf4")
    ),
    "model.remat": Option(
        "dots", "what the backward pass recomputes; dots: all but the linear maps", choices=("none", "dots", "full")
    ),
    "model.attention": Option(
        "auto",
        "splash is for TPU, cudnn for NVIDIA; auto: by platform, where it can run",
        choices=("auto", "xla", "cudnn", "splash"),
    ),
    "model.logits_chunk": Option(512, "tokens whose logits a device holds at a time", TOKENS),
    # The adapter
    "lora.rank": Option(128, "of A and B", between(1, 2**16 - 1)),
    "lora.alpha": Option(512.0, "BA is scaled by alpha/rank"),
    "lora.target_modules": Option(LINEAR_MAPS, "linear maps that have an adapter", MODULES),
    "lora.rslora": Option(False, "scale by alpha/√rank instead"),
    "lora.path": Option("", "PEFT adapter of this shape to start from: directory or Hub name; empty: a fresh one"),
    "lora.revision": Option("", "Hub branch, tag or commit; empty: the default branch"),
    # Data
    "data.train": Option("", "JSONL or Parquet file, a `datasets` name, or `synthetic` for the procedural task"),
    "data.train_split": Option("train", "split of a `datasets` name"),
    "data.heldout": Option("", "as data.train; empty: split off data.train, by prompt"),
    "data.heldout_split": Option("test", "split of a `datasets` name"),
    "data.heldout_fraction": Option(
        0.1,
        "share of the prompts held out when data.heldout is empty",
        Rule(lambda value: 0 < value < 1, "a number between 0 and 1"),
    ),
    "data.train_limit": Option(0, "use this many pairs of the pool, drawn by seed; 0: all", NOT_NEGATIVE),
    "data.heldout_limit": Option(0, "likewise of the held-out pairs, the same for every seed", NOT_NEGATIVE),
    "data.assumed_records": Option(
        10_000,
        "--compile_only reads no data: records that data.train, heldout and sft.data are taken to have unless their "
        "limits say it",
        EXAMPLES,
    ),
    "data.template": Option(
        "auto", "auto: the tokenizer's chat template if it has one, else plain", choices=("auto", "chat", "plain")
    ),
    "data.template_kwargs": Option("", 'options for the chat template as JSON, {"enable_thinking": false} for example'),
    "data.buckets": Option(((128, 128), (256, 512)), "(prompt, response) tokens: one compiled program each", BUCKETS),
    "data.more_buckets": Option(
        6, "at most so many buckets are added, where the pool's lengths make them worth compiling for", NOT_NEGATIVE
    ),
    "data.packing": Option(True, "on one device, the texts of a batch lie end to end, and are not padded to buckets"),
    # The procedural task
    "synthetic.families": Option(32, "kinds of prompts", between(1, 2**20)),
    "synthetic.styles": Option(3, "that responses are written in, each named by a letter", between(2, 26)),
    "synthetic.topics": Option(12, "words of a style", between(1, 2**20)),
    "synthetic.topics_per_family": Option(2, "those that a family's responses are about"),
    "synthetic.context_words": Option(2, "random words of a prompt beside its family", TOKENS),
    "synthetic.min_response": Option(5, "words", TOKENS),
    "synthetic.max_response": Option(8, "words", TOKENS),
    "synthetic.purity": Option(0.7, "share of a response's words that come from its style", SHARE),
    "synthetic.zipf": Option(
        1.5, "the k-th family's share of the pool is proportional to k**-zipf; 0: all are as common", NOT_NEGATIVE
    ),
    "synthetic.pool_pairs": Option(1024, "pairs of the pool", EXAMPLES),
    "synthetic.heldout_pairs": Option(1024, "held-out pairs, as many of each family", EXAMPLES),
    # Its decoder
    "scratch.hidden_size": Option(64, "width of the residual stream", between(2, 2**14)),
    "scratch.intermediate_size": Option(128, "width of the feed-forward map", between(1, 2**16)),
    "scratch.num_layers": Option(2, "transformer layers", between(1, 1024)),
    "scratch.num_heads": Option(4, "query heads"),
    "scratch.num_kv_heads": Option(2, "key and value heads"),
    "scratch.steps": Option(400, "optimiser steps"),
    "scratch.batch_size": Option(64, "examples an optimiser step", EXAMPLES),
    "scratch.examples": Option(2048, "to draw the batches from", EXAMPLES),
    "scratch.learning_rate": Option(3e-3, "the largest one; cosine schedule"),
    # Supervised fine-tuning
    "sft.data": Option("", "prompts with completions, or preferences, whose chosen response is learnt; empty: no SFT"),
    "sft.split": Option("train", "split of a `datasets` name"),
    "sft.limit": Option(0, "use this many examples, drawn by seed; 0: all", NOT_NEGATIVE),
    "sft.weights": Option(
        "lora", "what is trained: the adapter, which the rounds go on with, or all weights", choices=("lora", "full")
    ),
    "sft.learning_rate": Option(2e-5, "the largest one"),
    "sft.epochs": Option(1, "times that every example is learnt"),
    "sft.batch_size": Option(
        8, "examples an optimiser step, whose loss is the mean over its completion tokens", EXAMPLES
    ),
    "sft.examples_per_chunk": Option(
        8, "examples whose activations exist at a time; a chunk is of one bucket", EXAMPLES
    ),
    "sft.schedule": Option("linear", "of the learning rate after the warm-up", choices=_SCHEDULES),
    "sft.warmup_fraction": Option(0.1, "of the steps", SHARE),
    "sft.weight_decay": Option(0.0, "of everything that is trained, norms included", NOT_NEGATIVE),
    "sft.max_grad_norm": Option(1.0, "larger gradients are scaled down to it"),
    "sft.heldout_fraction": Option(
        0.0,
        "share of the prompts that the loss is measured on, not learnt; 0: none",
        Rule(lambda value: 0 <= value < 1, "a number from 0 to below 1"),
    ),
    # Gradient features
    "features.dim": Option(8192, "D", between(1, 2**30)),
    "features.dtype": Option(
        "float32", "of the pool's features in memory; selection computes in float32", choices=("float32", "bfloat16")
    ),
    "features.normalisation": Option(
        "response", "whether the gradient of each response is scaled to unit length", choices=("response", "none")
    ),
    "features.placement": Option(
        "devices",
        "where a round's features, or embeddings, are while it selects; host: in a temporary file of each host, and "
        "on the devices in blocks of selection.block rows each; same picks",
        choices=("devices", "host"),
    ),
    "features.groups_per_chunk": Option(8, "prompts, with their responses, that go through at a time", EXAMPLES),
    # Which pairs are asked about
    "selection.lam": Option(1.0, "λ of V = λI + Σ φφᵀ"),
    "selection.posterior": Option(
        "refreshed",
        "features of labelled pairs: at the current θ, or as they were when picked",
        choices=("refreshed", "frozen"),
    ),
    "selection.width_scale": Option(
        1.0, "c of the bounds μ ± c s of rewards, for `dts` and the others that choose on every prompt", NOT_NEGATIVE
    ),
    "selection.block": Option(1024, "candidates that a device holds while selecting"),
    "selection.pass_every": Option(
        1,
        "rounds from one pass over all candidates to the next; 0: the first round alone has one; between passes their "
        "features, or what else the strategy looks at, stay as they were",
        NOT_NEGATIVE,
    ),
    "selection.in_reach": Option(
        False,
        "between passes, pairs that would be picked are computed anew until all picks are of the current θ; "
        "approximate: a pair that has become better since the last pass may be missed",
    ),
    "selection.entropy_samples": Option(
        8, "responses a prompt from which `aplp` and `apl_entropy` estimate its entropy", between(1, 1024)
    ),
    # The command `select`: pairs to label, for those who train elsewhere
    "select.features": Option(
        "", ".npy or .safetensors file of [N, D] floats in pool order; no model is loaded then; empty: computed"
    ),
    "select.labelled": Option(
        "",
        "earlier labels: a filled-in label file, or pair ids in a .txt; these pairs count in V, and are not picked",
    ),
    "select.budget": Option(50, "pairs to pick", EXAMPLES),
    "select.in_blocks": Option(
        False,
        "features stay on the host, those of a .npy file on disk, and go to the devices in blocks of selection.block "
        "rows each: for pools that devices cannot hold; same picks",
    ),
    # The command `compare`: what counts, named before the runs
    "compare.metric": Option(
        "area",
        "of held-out accuracy: the area under its curve over the labels, divided by their number, or the final one",
        choices=("area", "final"),
    ),
    "compare.margin": Option(0.02, "differences of the metric up to this one count as none"),
    "compare.baseline": Option(
        "random",
        "the strategy that the others are held against",
        registry="activedpo_jax.selection.strategies:STRATEGIES",
    ),
    "compare.replicates": Option(10_000, "of the bootstrap over seeds and prompts", between(100, 1_000_000)),
    "compare.hour_price": Option(
        0.0, "of this machine, in the currency of a label's price; 0: not known", NOT_NEGATIVE
    ),
    "compare.retry": Option(False, "runs that failed before are tried again, from their last checkpoint"),
    # Where the candidates of a round come from
    "candidates.source": Option(
        "pool",
        "where a round's responses come from: the data's own pairs, the current policy, or both",
        choices=("pool", "policy", "mixture"),
    ),
    "candidates.prompts_per_round": Option(
        0, "0: all; else so many of the prompts, drawn by seed and round; where the policy responds", NOT_NEGATIVE
    ),
    # Who labels them
    "oracle.kind": Option(
        "dataset",
        "the data's labels; a Python function of texts; a JAX function of tokens; people, through files; a reward "
        "model; a language model as a judge",
        registry="activedpo_jax.verbs:ORACLES",
    ),
    "oracle.function": Option(
        "", "module:function, for `function` and `reward`; empty: the synthetic task's own reward"
    ),
    "oracle.annotators": Option(1, "answers that each pair gets from people"),
    "oracle.path": Option(
        "", "reward model in this process: a Hugging Face directory or Hub name (pip install '.[reward]')"
    ),
    "oracle.revision": Option("", "Hub branch, tag or commit; empty: the default branch"),
    "oracle.device": Option("cpu", "torch's name of what it runs on; on a GPU, JAX has to leave it room"),
    "oracle.dtype": Option(
        "auto", "of its weights; auto: float32 on a CPU, else bfloat16", choices=("auto", "float32", "bfloat16")
    ),
    "oracle.batch_size": Option(8, "responses that go through it at a time", EXAMPLES),
    "oracle.url": Option(
        "",
        "judge: where /chat/completions is, such as https://api.openai.com/v1; reward model: vLLM's /classify or "
        "/pooling, such as http://localhost:8000/classify",
    ),
    "oracle.model": Option("", "its name on that server"),
    "oracle.api_key_variable": Option("", "the environment variable that has the API key; empty: none is sent"),
    "oracle.concurrency": Option(8, "requests to the server at a time", between(1, 1024)),
    "oracle.timeout_seconds": Option(120.0, "that a request may take, with its answer"),
    "oracle.attempts": Option(6, "times that a request is sent, if the server fails or is busy", between(1, 1000)),
    "oracle.template": Option(
        "", "the judge's prompt: a text file with {prompt}, {first} and {second} in it; empty: one of our own"
    ),
    "oracle.request": Option(
        "", 'fields of the judge\'s requests as JSON, {"max_tokens": 9000} for example; null leaves one out'
    ),
    "oracle.max_failed": Option(0.1, "share of a round's pairs that may have no answer, and are skipped", SHARE),
    "oracle.prompt_price": Option(0.0, "of a million tokens that the judge reads, in any currency", NOT_NEGATIVE),
    "oracle.completion_price": Option(0.0, "of a million tokens that it writes", NOT_NEGATIVE),
    "oracle.noise": Option("none", "of the labels", choices=("none", "flip", "bradley_terry")),
    "oracle.flip_probability": Option(0.0, "of a label, with `flip`", SHARE),
    "oracle.temperature": Option(1.0, "of the rewards, with `bradley_terry`"),
    # Training on the labels
    "dpo.loss": Option(
        "sigmoid",
        "TRL's names: DPO's own is sigmoid, conservative DPO with label_smoothing",
        registry="activedpo_jax.training.losses:LOSSES",
    ),
    "dpo.beta": Option(0.1, "β"),
    "dpo.label_smoothing": Option(
        0.0,
        "probability that a label is taken to be wrong",
        Rule(lambda value: 0 <= value < 0.5, "a number from 0 to below 0.5"),
    ),
    "dpo.sft_weight": Option(
        0.0, "of the mean −log π over the tokens of the batch's preferred responses, which is added", NOT_NEGATIVE
    ),
    "dpo.learning_rate": Option(1e-4, "the largest one"),
    "dpo.epochs": Option(4, "times that every labelled pair is learnt in a round"),
    "dpo.batch_size": Option(8, "pairs an optimiser step", EXAMPLES),
    "dpo.pairs_per_chunk": Option(
        8, "pairs whose activations exist at a time; gradients of a batch's chunks add up", EXAMPLES
    ),
    "dpo.schedule": Option("linear", "of the learning rate after the warm-up", choices=_SCHEDULES),
    "dpo.warmup_fraction": Option(0.1, "of the round's steps", SHARE),
    "dpo.weight_decay": Option(0.0, "of the adapter", NOT_NEGATIVE),
    "dpo.max_grad_norm": Option(1.0, "larger gradients are scaled down to it"),
    "dpo.train_on": Option("all", "labels of all rounds, or of the newest", choices=("all", "newest")),
    "dpo.start_from": Option(
        "sft", "each round's θ: that before all rounds, or the current", choices=("sft", "current")
    ),
    "round.mode": Option(
        "auto",
        "one compiled program, or stages with progress bars; auto: by length",
        choices=("auto", "fused", "staged"),
    ),
    "evaluation.calibration": Option(
        False,
        "after the last round, how far known rewards of held-out pairs are from the implicit reward, in its own widths",
    ),
    "evaluation.pairs_per_chunk": Option(
        16, "held-out pairs that go through at a time, and held-out prompts that are responded to", EXAMPLES
    ),
    "evaluation.on_policy_prompts": Option(
        0,
        "held-out prompts that the policy after the last round and the SFT model respond to, once each; 0: none",
        between(0, 2**20),
    ),
    "evaluation.reward": Option(
        "", "module:function that compares these responses; of another family than what labels"
    ),
    "export.merged": Option(False, "beside `adapter/` write `merged/`, a whole Hugging Face checkpoint"),
    # Responses of the model: to prompts of a file, or of `candidates`
    "generation.prompts": Option("", "JSONL or Parquet file, or a `datasets` name, with prompts or preferences"),
    "generation.split": Option("train", "split of a `datasets` name"),
    "generation.responses": Option(3, "different ones to each prompt; m", RESPONSES),
    # Logits are divided by the temperature, in float32.
    "generation.temperature": Option(1.0, "of the sampling", between(0.001, 1000)),
    "generation.top_k": Option(0, "sample among the k likeliest tokens; 0: all", NOT_NEGATIVE),
    "generation.top_p": Option(
        1.0,
        "among the fewest likeliest tokens that have this probability between them; 1: all",
        Rule(lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    ),
    "generation.max_new_tokens": Option(128, "of a response", TOKENS),
    "generation.resamples": Option(
        3, "attempts to replace responses that are empty, or the same as another", between(0, 1000)
    ),
    "generation.prompts_per_chunk": Option(8, "prompts that are responded to at a time", EXAMPLES),
    # Devices along each axis of the mesh
    "mesh.data": Option(-1, "devices over which examples are cut", AXIS),
    "mesh.fsdp": Option(1, "devices over which examples and weights are cut", AXIS),
    "mesh.tensor": Option(1, "devices over which heads and hidden units are cut", AXIS),
}


def default() -> ml_collections.ConfigDict:
    """Every option of a run, with its default."""
    config = ml_collections.ConfigDict()
    for name, option in OPTIONS.items():
        *groups, last = name.split(".")
        inside = config
        for group in groups:
            if group not in inside:
                inside[group] = ml_collections.ConfigDict()
            inside = inside[group]
        inside[last] = option.default
    return config
