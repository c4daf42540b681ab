"""Checks of options that go together: those that need or exclude each other, and sizes that they make between them."""

import re
from typing import Any

import ml_collections

from activedpo_jax.config import OPTIONS
from activedpo_jax.errors import UsageError
from activedpo_jax.files import flatten

_FUNCTION = r"[^\W\d]\w*(\.[^\W\d]\w*)*:\w+"


def check(config: ml_collections.ConfigDict, command: str) -> None:
    """Checks a config each of whose options is valid by itself.

    Args:
      command: one of `flags.COMMANDS`.

    Raises:
      UsageError: for the first options that do not go together: their names, what they are, and what was expected.
    """
    _check_data_and_model(config, command)
    _check_oracle(config)
    _check_evaluation(config)
    _check_labels(config)
    if config.dpo.loss == "kto" and config.dpo.batch_size == 1:
        raise wrong("dpo.batch_size", 1, "more with dpo.loss='kto', which compares a prompt with others' responses")
    _check_sizes(config)
    if config.data.train == "synthetic":
        _check_synthetic(config)
    if command == "compare":
        _check_comparison(config)


def wrong(name: str, value: Any, expected: str) -> UsageError:
    """What to raise for an option's value."""
    return UsageError(f"config.{name}: got {value!r}, expected {expected}")


def _check_data_and_model(config: ml_collections.ConfigDict, command: str) -> None:
    """Options that need, or exclude, each other.  An option that would be ignored is an error, too."""
    needs_no_pool = config.sft.data or config.generation.prompts
    if not (config.data.train or (command not in ("main", "compare") and needs_no_pool)):
        raise UsageError("config.data.train: got '', expected a file, the name of a data set, or synthetic")
    if config.sft.data and not config.model.path:
        raise UsageError(
            f"config.sft.data: got {config.sft.data!r} without config.model.path; expected a Hugging Face directory "
            "or name there, whose tokenizer makes tokens of the texts"
        )
    if config.sft.data and config.sft.weights == "full" and config.lora.path:
        raise UsageError(
            f"config.lora.path: got {config.lora.path!r} with sft.weights='full', which changes the base weights "
            "that the adapter was made for; expected an empty lora.path, or sft.weights='lora'"
        )
    if config.model.quantisation != "none" and config.sft.data and config.sft.weights == "full":
        raise UsageError(
            f"config.model.quantisation: got {config.model.quantisation!r} with sft.weights='full', which trains the "
            "weights themselves; expected 'none', or sft.weights='lora'"
        )
    if config.export.merged and not config.model.path:
        raise UsageError(
            "config.export.merged: got True without config.model.path; expected a Hugging Face directory or name "
            "there, into whose weights the adapter can be merged"
        )
    has_features = command == "select" and config.select.features  # then no model is loaded
    if not config.model.path and config.data.train != "synthetic" and not has_features:
        raise UsageError(
            f"config.model.path: got '' with data.train={config.data.train!r}, expected a Hugging Face "
            "directory or name; only data.train='synthetic' brings a decoder of its own"
        )


def answers_on_device(config: ml_collections.ConfigDict) -> bool:
    """Whether a round's program can ask the oracle.  The noise of a reward depends on pairs' names, which no program
    knows."""
    oracle = config.oracle
    return oracle.kind == "dataset" or (oracle.kind == "reward" and oracle.noise == "none")


# Options that some kinds of oracle alone look at, `reward_model` here or behind a server.
_SERVED = ("judge", "reward_model with oracle.url")
_OF_KINDS = {
    "path": ("reward_model",),
    **dict.fromkeys(("revision", "device", "dtype", "batch_size"), ("reward_model with oracle.path",)),
    "url": ("judge", "reward_model"),
    **dict.fromkeys(("model", "api_key_variable", "concurrency", "timeout_seconds", "attempts"), _SERVED),
    **dict.fromkeys(("template", "request", "prompt_price", "completion_price"), ("judge",)),
    "max_failed": ("judge", "reward_model"),
}


def _check_models(oracle: ml_collections.ConfigDict) -> None:
    """A judge or a reward model: where it is, and what is asked of it."""
    kind = oracle.kind
    if kind == "reward_model" and bool(oracle.path) == bool(oracle.url):
        raise UsageError(
            f"config.oracle.path: got {oracle.path!r} with oracle.url={oracle.url!r} and oracle.kind='reward_model'; "
            "expected one of them: a model to load here, or where one is served"
        )
    place = "path" if oracle.path else "url"
    for name, kinds in _OF_KINDS.items():
        default, value = OPTIONS[f"oracle.{name}"].default, oracle[name]
        if value != default and not {kind, f"{kind} with oracle.{place}"} & set(kinds):
            raise UsageError(
                f"config.oracle.{name}: got {value!r} with oracle.kind={kind!r}, which does not look at it; expected "
                f"{default!r}, or oracle.kind={' or '.join(kinds)}"
            )
    if oracle.api_key_variable and not re.fullmatch(r"[A-Za-z_]\w*", oracle.api_key_variable):
        raise UsageError(  # which does not say what it is: it may be the key
            "config.oracle.api_key_variable: expected the name of an environment variable, such as OPENAI_API_KEY; the "
            "key itself does not belong there, since options are on record"
        )
    if kind == "judge" and not oracle.url:
        raise wrong("oracle.url", "", "where the judge's /chat/completions is, such as https://api.openai.com/v1")
    if oracle.url and not oracle.model:
        raise wrong("oracle.model", "", f"the name by which {oracle.url} knows it")
    if oracle.url and not re.fullmatch(r"https?://[^\s/]\S*", oracle.url):
        raise wrong("oracle.url", oracle.url, "http://HOST:PORT/PATH, or https")
    if kind == "reward_model" and oracle.url and not oracle.url.endswith(("/classify", "/pooling")):
        raise wrong("oracle.url", oracle.url, "vLLM's /classify or /pooling, such as http://localhost:8000/classify")


def _check_oracle(config: ml_collections.ConfigDict) -> None:
    """Who labels, what, and how."""
    oracle, source, mode = config.oracle, config.candidates.source, config.round.mode
    kind, noise = oracle.kind, oracle.noise
    _check_models(oracle)
    if oracle.function and kind not in ("function", "reward"):
        raise UsageError(
            f"config.oracle.function: got {oracle.function!r} with oracle.kind={kind!r}, which asks no function; "
            "expected an empty one, or oracle.kind='function' or 'reward'"
        )
    if kind == "reward" and not oracle.function and config.data.train != "synthetic":
        raise UsageError(
            "config.oracle.function: got '' with oracle.kind='reward', expected module:function; only "
            "data.train='synthetic' brings a reward of its own"
        )
    if (kind == "function" or oracle.function) and not re.fullmatch(_FUNCTION, oracle.function):
        raise wrong("oracle.function", oracle.function, "module:function, such as my.rewards:helpful")
    if oracle.annotators != 1 and kind != "people":
        raise UsageError(
            f"config.oracle.annotators: got {oracle.annotators} with oracle.kind={kind!r}, which answers once; "
            "expected 1, or oracle.kind='people'"
        )
    if noise == "bradley_terry" and kind in ("people", "judge"):
        raise UsageError(
            f"config.oracle.noise: got {noise!r} with oracle.kind={kind!r}, which has no rewards to draw from; "
            "expected 'none' or 'flip'"
        )
    if oracle.flip_probability and noise != "flip":
        raise UsageError(
            f"config.oracle.flip_probability: got {oracle.flip_probability} with "
            f"oracle.noise={noise!r}, which flips nothing; expected oracle.noise='flip'"
        )
    if oracle.temperature != 1 and noise != "bradley_terry":
        raise UsageError(
            f"config.oracle.temperature: got {oracle.temperature} with oracle.noise={noise!r}, "
            "which has no temperature; expected oracle.noise='bradley_terry'"
        )
    if source != "pool" and kind == "dataset":
        raise UsageError(
            f"config.candidates.source: got {source!r} with oracle.kind='dataset', which has no labels of fresh "
            "responses; expected 'pool', or another oracle.kind"
        )
    if config.candidates.prompts_per_round and source == "pool":
        raise UsageError(
            f"config.candidates.prompts_per_round: got {config.candidates.prompts_per_round} with "
            "candidates.source='pool', which takes all pairs; expected 0, or candidates.source='policy' or 'mixture'"
        )
    passes = config.selection.pass_every
    if config.selection.in_reach and passes == 1:
        raise wrong("selection.in_reach", True, "False with selection.pass_every=1, which computes everything anew")
    if passes != 1 and source != "pool":
        raise UsageError(
            f"config.selection.pass_every: got {passes} with candidates.source={source!r}, whose candidates are others "
            "in every round; expected 1, or candidates.source='pool'"
        )
    for name in ("selection.pass_every", "features.placement"):
        value = flatten(config)[name]
        if mode == "fused" and value != OPTIONS[name].default:
            raise UsageError(
                f"config.{name}: got {value!r} with round.mode='fused', a program that computes all and keeps it on "
                f"the devices; expected {OPTIONS[name].default!r}, or round.mode='auto' or 'staged'"
            )
    if mode == "fused" and not answers_on_device(config):
        noisy = f" and oracle.noise={noise!r}" if kind == "reward" else ""
        raise UsageError(
            f"config.round.mode: got 'fused' with oracle.kind={kind!r}{noisy}, whose answers come from outside the "
            "program; expected 'auto' or 'staged'"
        )


def _check_evaluation(config: ml_collections.ConfigDict) -> None:
    """Responses of the last policy are compared by a reward, and not by the one that it was trained on."""
    reward, prompts, oracle = config.evaluation.reward, config.evaluation.on_policy_prompts, config.oracle
    if reward and not prompts:
        raise wrong("evaluation.reward", reward, "'' with evaluation.on_policy_prompts=0, which compares nothing")
    if prompts and not re.fullmatch(_FUNCTION, reward):
        raise wrong("evaluation.reward", reward, "module:function, such as my.rewards:helpful, to compare responses by")
    if prompts and oracle.kind in ("function", "reward") and reward == oracle.function:
        expected = "another function than oracle.function: the reward that labels is not the reward that evaluates"
        raise wrong("evaluation.reward", reward, expected)


def _check_labels(config: ml_collections.ConfigDict) -> None:
    """As many labels as there are pairs, and as the arrays of a run can hold."""
    source, synthetic = config.candidates.source, config.data.train == "synthetic"
    labels = config.rounds * config.labels_per_round
    if labels * config.dpo.epochs >= 2**31:
        raise UsageError(
            f"config.rounds: got {config.rounds} with labels_per_round={config.labels_per_round} and "
            f"dpo.epochs={config.dpo.epochs}, expected a product below {2**31:,}"
        )
    if source == "pool" and synthetic and labels > config.synthetic.pool_pairs:
        raise UsageError(
            f"config.rounds: got {config.rounds} with labels_per_round={config.labels_per_round}, expected at most "
            f"synthetic.pool_pairs={config.synthetic.pool_pairs} labels together"
        )
    prompts = config.candidates.prompts_per_round
    if synthetic and not (0 < prompts < config.synthetic.pool_pairs):
        prompts = config.synthetic.pool_pairs
    m = config.generation.responses
    if source == "policy" and prompts and config.labels_per_round > prompts * (m * (m - 1) // 2):
        raise UsageError(
            f"config.labels_per_round: got {config.labels_per_round}, expected at most {prompts * (m * (m - 1) // 2)}: "
            f"the pairs among generation.responses={m} responses to {prompts} prompts"
        )


def _check_comparison(config: ml_collections.ConfigDict) -> None:
    """There is something to compare, and something to compare it with."""
    if len(config.strategies) < 2:
        raise wrong("strategies", ", ".join(config.strategies), "two or more to compare")
    if config.compare.baseline not in config.strategies:
        raise wrong(
            "compare.baseline", config.compare.baseline, f"one of the strategies {', '.join(config.strategies)}"
        )


def _check_sizes(config: ml_collections.ConfigDict) -> None:
    """Products of options that are the sizes of arrays."""
    m, response = config.generation.responses, max(response for _, response in config.data.buckets)
    for name, count in (
        ("generation.prompts_per_chunk", config.generation.prompts_per_chunk * m * config.generation.max_new_tokens),
        ("features.groups_per_chunk", config.features.groups_per_chunk * m * response),
        ("features.groups_per_chunk", config.features.groups_per_chunk * config.features.dim),
        ("evaluation.pairs_per_chunk", config.evaluation.pairs_per_chunk * 2 * response),
        ("evaluation.on_policy_prompts", config.evaluation.on_policy_prompts * 2 * response),
        ("dpo.pairs_per_chunk", config.dpo.pairs_per_chunk * 2 * response),
        ("sft.examples_per_chunk", config.sft.examples_per_chunk * response),
    ):
        if count >= 2**31:
            expected = f"less: an array would have {count:,} numbers, and can have {2**31 - 1:,}"
            raise wrong(name, flatten(config)[name], expected)
    if list(config.mesh.values()).count(-1) > 1:
        raise UsageError(f"config.mesh: got {dict(config.mesh)}, expected -1 for one axis at most")


def _check_synthetic(config: ml_collections.ConfigDict) -> None:
    """The procedural task can be written, and its decoder can be built and trained."""
    task, scratch = config.synthetic, config.scratch
    at_random = task.purity + (1 - task.purity) / task.styles
    longest = task.max_response + 1
    head = scratch.hidden_size // scratch.num_heads
    for excluded, name, expected in (
        (
            task.topics_per_family > task.topics,
            "synthetic.topics_per_family",
            f"at most synthetic.topics={task.topics}",
        ),
        (
            task.min_response > task.max_response,
            "synthetic.min_response",
            f"at most synthetic.max_response={task.max_response}",
        ),
        (
            at_random < 0.1,
            "synthetic.purity",
            f"more: with synthetic.styles={task.styles} a word is of its response's style with probability "
            f"{at_random:.2g}, and a style that leads would be found too rarely; 0.1 will do",
        ),
        (
            scratch.hidden_size % scratch.num_heads != 0,
            "scratch.hidden_size",
            f"a multiple of scratch.num_heads={scratch.num_heads}",
        ),
        (
            head % 2 != 0,
            "scratch.hidden_size",
            f"an even number for each of scratch.num_heads={scratch.num_heads} heads, since rotary embeddings rotate "
            f"pairs of channels; {head} is odd",
        ),
        (
            scratch.num_heads % scratch.num_kv_heads != 0,
            "scratch.num_heads",
            f"a multiple of scratch.num_kv_heads={scratch.num_kv_heads}",
        ),
        (
            config.candidates.source != "pool" and config.generation.max_new_tokens > longest,
            "generation.max_new_tokens",
            f"at most {longest} with candidates.source={config.candidates.source!r}: the words of "
            f"synthetic.max_response={task.max_response}, and their end",
        ),
    ):
        if excluded:
            raise wrong(name, flatten(config)[name], expected)
