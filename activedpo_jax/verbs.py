"""Options become the verbs of a run's rounds: where candidates come from, how a round runs, and who is asked."""

import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections

from activedpo_jax import specs, start
from activedpo_jax.data.groups import Candidates
from activedpo_jax.huggingface import hub
from activedpo_jax.models.policy import Policy
from activedpo_jax.oracles import local_reward_model
from activedpo_jax.oracles.client import Server
from activedpo_jax.oracles.dataset import DatasetOracle, answers
from activedpo_jax.oracles.function import FunctionOracle, load_function
from activedpo_jax.oracles.judge import TEMPLATE, JudgeOracle, JudgeSpec, check_template
from activedpo_jax.oracles.labels import Oracle
from activedpo_jax.oracles.noise import Noise
from activedpo_jax.oracles.people import PeopleOracle
from activedpo_jax.oracles.reward import Reward, RewardOracle
from activedpo_jax.oracles.reward_model import Model, RemoteModel, RewardModelOracle
from activedpo_jax.resumable import NOTHING_SAVED, SavedWork
from activedpo_jax.rounds import fresh, fused, staged
from activedpo_jax.rounds.choose import DeviceCandidates
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import RunState
from activedpo_jax.tasks import Task

Rounds = fused.FusedRound | staged.StagedRound


def make(
    config: ml_collections.ConfigDict,
    spec: RoundSpec,
    task: Task,
    policy: Policy,
    seed: int,
    saved: SavedWork = NOTHING_SAVED,
) -> Rounds:
    """The rounds of a run, fused or staged.

    Args:
      saved: what is kept of a round under way.

    Raises:
      ValueError: as of `specs.is_fused`, or the data has no labels where they are asked for.
    """
    if specs.is_fused(config, task):
        return _fused(config, spec, task, policy, seed, saved)

    def candidates(state: RunState) -> Candidates:
        if task.prompts is None:
            assert task.pool is not None
            return task.pool
        widths = [bucket.prompt for bucket in task.buckets]
        drawn = _drawn(config, task, seed, int(state.round) + 1)
        found = fresh.fresh_candidates(spec, policy, state, drawn, widths, saved)
        return found if task.pool is None else fresh.merged(task.pool, found)

    return staged.StagedRound(spec, policy, candidates, task.buckets, saved)


def _drawn(config: ml_collections.ConfigDict, task: Task, seed: int, number: int) -> fresh.PromptSet:
    """The prompts that the policy responds to in round `number`."""
    assert task.prompts is not None
    return task.prompts.draw(config.candidates.prompts_per_round, seed, number)


def _fused(
    config: ml_collections.ConfigDict, spec: RoundSpec, task: Task, policy: Policy, seed: int, saved: SavedWork
) -> fused.FusedRound:
    pool, bucket = task.pool, spec.bucket
    placed = None if pool is None else fused.place(spec, pool, bucket)

    def source(number: int) -> fused.Source:
        if task.prompts is None:
            assert placed is not None
            return jax.tree_util.Partial(fused.given, placed)
        drawn = _drawn(config, task, seed, number)
        if placed is None:
            return fresh.fresh_source(spec, drawn, bucket)
        return fresh.mixed_source(spec, placed, drawn, bucket)

    def candidates(state: RunState, made: DeviceCandidates | None) -> Candidates:
        if made is None:
            assert pool is not None
            return pool
        found = fresh.on_host(spec, state, _drawn(config, task, seed, int(state.round) + 1), made)
        return found if pool is None else fresh.merged(pool, found)

    if config.oracle.kind == "reward":
        ask = fused.rewarded(reward_function(config, task)), reward_name(config)
    else:
        assert pool is not None
        noise = make_noise(config, seed)
        ask = fused.known_answers(spec, answers(pool, noise)), f"dataset ({noise.kind} noise)"
    return fused.FusedRound(spec, policy, source, candidates, ask, saved)


class Asking(NamedTuple):
    """What an oracle is made from."""

    config: ml_collections.ConfigDict
    task: Task
    seed: int
    folder: pathlib.Path  # of the run


def oracle(asking: Asking, rounds: Rounds) -> Oracle:
    """Who is asked in these rounds.

    Raises:
      ValueError: the function of `config.oracle.function` cannot be had.
    """
    return rounds if isinstance(rounds, fused.FusedRound) else ORACLES[asking.config.oracle.kind](asking)


def _dataset(asking: Asking) -> Oracle:
    assert asking.task.pool is not None
    return DatasetOracle(asking.task.pool, make_noise(asking.config, asking.seed))


def _function(asking: Asking) -> Oracle:
    name = asking.config.oracle.function
    function = load_function(name, "config.oracle.function")
    return FunctionOracle(function, name, make_noise(asking.config, asking.seed))


def _reward(asking: Asking) -> Oracle:
    reward = reward_function(asking.config, asking.task)
    noise = make_noise(asking.config, asking.seed)
    return RewardOracle(reward, reward_name(asking.config), asking.task.buckets[-1], noise)


def _people(asking: Asking) -> Oracle:
    return PeopleOracle(asking.folder, asking.config.oracle.annotators, make_noise(asking.config, asking.seed))


def _reward_model(asking: Asking) -> Oracle:
    options = asking.config.oracle
    model: Model
    if options.url:
        model = RemoteModel(_server(asking.config, options.url), options.model)
    else:
        source = options.path, options.revision, options.device, options.dtype
        model = local_reward_model.LocalModel(*source, options.batch_size)
    return RewardModelOracle(model, options.max_failed, make_noise(asking.config, asking.seed))


def _judge(asking: Asking) -> Oracle:
    options = asking.config.oracle
    url = options.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    spec = JudgeSpec(
        server=_server(asking.config, url),
        model=options.model,
        template=judge_template(asking.config),
        request=start.json_object("oracle.request", options.request),
        max_failed=options.max_failed,
        prices=(options.prompt_price, options.completion_price),
    )
    return JudgeOracle(spec, asking.folder, make_noise(asking.config, asking.seed))


def _server(config: ml_collections.ConfigDict, url: str) -> Server:
    options = config.oracle
    return Server(url, options.api_key_variable, options.concurrency, options.timeout_seconds, options.attempts)


# By `config.oracle.kind`.
ORACLES: dict[str, Callable[[Asking], Oracle]] = {
    "dataset": _dataset,
    "function": _function,
    "reward": _reward,
    "people": _people,
    "reward_model": _reward_model,
    "judge": _judge,
}


def judge_template(config: ml_collections.ConfigDict) -> str:
    """The text of `config.oracle.template`, or our own.

    Raises:
      ValueError: the file cannot be read, or lacks a place for a text.
    """
    path = config.oracle.template
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8") if path else TEMPLATE
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config.oracle.template: {path}: {error}; expected a text file") from error
    check_template(text)
    return text


def oracle_inputs(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Fingerprints of the files that an oracle is made from.

    Raises:
      ValueError: they cannot be had, or what a judge is asked is malformed.
    """
    if config.oracle.kind == "judge":
        start.json_object("oracle.request", config.oracle.request)
        digest = hashlib.blake2b(judge_template(config).encode(), digest_size=16).hexdigest()
        return {"judge's prompt": digest}
    if config.oracle.kind == "reward_model" and config.oracle.path:
        return {"reward model": _fingerprint(config.oracle.path, config.oracle.revision)}
    return {}


@functools.cache
def _fingerprint(path: str, revision: str) -> str:
    local_reward_model.fetch(path, revision)
    return hub.fingerprint(path, revision)


def make_noise(config: ml_collections.ConfigDict, seed: int) -> Noise:
    options = config.oracle
    return Noise(options.noise, options.flip_probability, options.temperature, seed)


def reward_function(config: ml_collections.ConfigDict, task: Task) -> Reward:
    """The JAX function of `config.oracle.function`, or the synthetic task's own reward.

    Raises:
      ValueError: it cannot be had.
    """
    if config.oracle.function:
        found = load_function(config.oracle.function, "config.oracle.function")
        return found if isinstance(found, jax.tree_util.Partial) else jax.tree_util.Partial(found)
    assert task.reward is not None
    return task.reward


def reward_name(config: ml_collections.ConfigDict) -> str:
    return config.oracle.function or "the task's own reward"
