"""What commands that run rounds have in common: what the runs of one seed share, and one run after another.

`main` makes them, `compare` holds several against each other.
"""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from activedpo_jax import errors, files, hosts, layout, sft, specs, start, tasks, verbs
from activedpo_jax.data.groups import shared_prompts
from activedpo_jax.evaluation import calibration, heldout, on_policy
from activedpo_jax.huggingface import adapters, merged
from activedpo_jax.models.policy import Policy
from activedpo_jax.oracles.dataset import answers
from activedpo_jax.oracles.function import load_function, rewards
from activedpo_jax.oracles.labels import Checked, Metered, Pending
from activedpo_jax.oracles.noise import Noise
from activedpo_jax.record import checkpoints, folders, inputs, metrics, outcomes, report
from activedpo_jax.record.labels import RoundRecord, fingerprint
from activedpo_jax.record.saved_work import SavedWork
from activedpo_jax.rounds.checks import check_learnt
from activedpo_jax.rounds.choose import all_labelled_vectors
from activedpo_jax.rounds.picked import as_answers
from activedpo_jax.rounds.spec import RoundSpec
from activedpo_jax.rounds.state import RunState, initial_state
from activedpo_jax.training.loop import Diverged

labelled_program = jax.jit(all_labelled_vectors, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the runs of one seed share."""

    config: ml_collections.ConfigDict
    mesh: Mesh
    seed: int
    task: tasks.Task
    policy: Policy
    judge: heldout.Evaluator


def begin(config: ml_collections.ConfigDict, folder: pathlib.Path, mesh: Mesh, command: str) -> tasks.Task:
    """Takes the work directory for `command`, and returns the task of the first seed.

    Raises:
      ValueError: the options, the data or the model are others than the directory began with, or are not valid:
        nothing is claimed then.
    """
    folders.check_workdir(folder, config, command)
    first = tasks.load(config, config.seeds[0], mesh, folder, hosts.readers())
    inputs.check(folder / "inputs" / f"seed{config.seeds[0]}.json", described(config, first))
    for strategy in config.strategies:
        specs.round_spec(config, strategy, first, mesh)
    if config.evaluation.reward:
        load_function(config.evaluation.reward, "config.evaluation.reward")
    given = first.heldout.rewards
    if config.evaluation.calibration and (given is None or not np.all(np.isfinite(given))):
        raise ValueError(
            "config.evaluation.calibration: held-out pairs have no rewards, which it compares with; expected fields "
            "`score_chosen` and `score_rejected` in each of them, or evaluation.calibration=False"
        )
    folders.open_workdir(folder, config, command)
    return first


def prepare(
    config: ml_collections.ConfigDict, task: tasks.Task, mesh: Mesh, seed: int, folder: pathlib.Path
) -> Setting:
    """Everything that the runs of a seed share, of its task; what there is to know of the data is printed."""
    inputs.hold(folder / "inputs" / f"seed{seed}.json", described(config, task))
    task = specs.with_more_buckets(config, task)
    for name, texts in (("pool", task.candidate_texts), ("held-out set", task.heldout)):
        for note in texts.notes:
            print(f"{name}: {note}")
    if task.pool is not None:
        print(f"pool: {specs.padding_note(config, task)}")
    task, policy = starting_point(config, task, mesh, seed, folder)
    return Setting(config, mesh, seed, task, policy, evaluator(config, task, policy, seed, folder))


def run(setting: Setting, strategy: str, folder: pathlib.Path) -> folders.RunSummary | Pending:
    """One strategy on one seed: choose, ask, learn and evaluate, from the round after the last that was saved.

    Returns:
      the summary; or that answers are missing: what there is to do, in one line.

    Raises:
      FloatingPointError: picks, losses or weights are not finite.
      ValueError: the oracle cannot answer, or the folder's state does not fit.
    """
    config, policy = setting.config, setting.policy
    spec = specs.round_spec(config, strategy, setting.task, setting.mesh)
    saved = SavedWork(folder, config.checkpoint_minutes)
    rounds = verbs.make(setting.config, spec, setting.task, policy, setting.seed, saved)
    oracle = verbs.oracle(verbs.Asking(config, setting.task, setting.seed, folder), rounds)

    state = initial_state(spec, policy.reference, setting.seed)
    store = checkpoints.Checkpoints(folder)
    done, restored = store.restore_latest(state)
    summary = folders.resumed_summary(folder, strategy, setting.seed, done)
    told = set[str]()  # kinds of notes
    heldout_pairs = setting.task.heldout
    digests = outcomes.prompt_digests([heldout_pairs.prompt_tokens[group] for group in heldout_pairs.pairs[:, 0]])
    judged = outcomes.OutcomesWriter(folder, digests, 0 if done is None else done + 1)
    with errors.signals_wait(), metrics.MetricsWriter(folder, 0 if done is None else done + 1) as writer:

        def save(state: RunState, entry: folders.RoundSummary, margins: np.ndarray) -> None:
            judged.add(margins)
            summary["rounds"].append(entry)
            writer.write(entry["round"], entry["labels"], scalars(entry))
            writer.sync()
            folders.write_summary(folder, summary)
            store.save(entry["round"], state)  # last: whatever is in a checkpoint is on record
            if hosts.any_of(errors.signalled()):
                store.wait()
                errors.end()

        if restored is None:
            before = setting.judge.judged(None)
            save(state, report.round_zero(before.scores), before.margins)
        else:
            state = restored
        if int(state.round) < config.rounds:
            hosts.on_first(files.remove_folder)(folder / "merged")  # of a run with fewer rounds
            if isinstance(oracle, Checked):
                hosts.on_first(oracle.check)()
        for number in range(1, int(state.round) + 1):
            if late := RoundRecord(folder, number).late_answers(oracle):
                print(f"{strategy}, seed {setting.seed}: {late} answers came after round {number} was learnt: not used")
        for number in range(int(state.round) + 1, config.rounds + 1):
            record = RoundRecord(folder, number)
            saved.enter(number, "choice")
            picked = record.picked()
            if picked is None or rounds.one_program:
                picked = rounds.choose(state)
                store.wait()  # what is asked comes of a state that is on disk
                saved.forget_others()
                record.ask(picked)
            verdicts = record.collect(oracle, picked)
            if isinstance(verdicts, Pending):
                return verdicts
            labels = [verdicts[question.pair_id].label for question in picked.questions]
            saved.enter(number, f"learnt_from_{fingerprint(labels)}")  # people change their minds between two tries
            try:
                state, training = rounds.learn(state, picked, as_answers(spec, labels))
            except Diverged as error:
                raise FloatingPointError(f"{error}.  {report.where_diverged(folder, spec, number, error)}") from error
            check_learnt(training, state.lora, number)
            said = {"picks": [q.digest for q in picked.questions], "labels": [str(label) for label in labels]}
            hosts.agree(f"round {number}", said | {"adapter": state.lora})

            folders.write_selected(folder, number, folders.joined(picked, verdicts))
            clock = time.perf_counter()
            found = setting.judge.judged(state.lora, saved)
            seconds = rounds.seconds | {"evaluation": time.perf_counter() - clock}
            entry = report.round_summary(spec.selection, picked, verdicts, training, found.scores, seconds)
            if rounds.useful is not None:
                entry["useful"] = rounds.useful
            if isinstance(oracle, Metered):
                entry["oracle"] = hosts.on_first(oracle.used)(number)
            save(state, entry, found.margins)
            print(report.round_line(strategy, setting.seed, config.rounds, entry), flush=True)
            for kind, note in report.round_notes(spec, entry).items():
                if kind not in told:
                    print(f"{strategy}, seed {setting.seed}: {note}", flush=True)
                told.add(kind)
        if compared := compare_responses(setting, state, folder, saved):
            print(f"{strategy}, seed {setting.seed}: {on_policy.line(compared)}", flush=True)
    store.close()
    saved.forget()
    saved.close()
    export(setting, state, folder)
    if config.evaluation.calibration:
        calibrate(setting, spec, state, folder / "calibration.json")
    return summary


def calibrate(setting: Setting, spec: RoundSpec, state: RunState, path: pathlib.Path) -> None:
    """The report of `evaluation.calibration` on the run's last posterior, whatever its strategy; once."""
    number = int(state.round)
    if folders.is_of_round(path, number):
        return
    known_rewards, truth = setting.task.heldout.rewards, answers(setting.task.heldout, Noise(seed=setting.seed))
    assert known_rewards is not None
    spec = dataclasses.replace(spec, selection=dataclasses.replace(spec.selection, strategy="activedpo"))
    known = labelled_program(spec, setting.policy, state)
    labelled, filled = state.labelled, np.arange(spec.capacity) < int(state.labelled.size)
    posterior = calibration.posterior_of(known, filled & (layout.get(labelled.weights) > 0), spec.selection.lam)
    found = calibration.heldout_widths(
        spec.evidence, setting.policy, state.lora, posterior, setting.judge.batches, state.seed
    )
    differences = np.where(truth == 0, 1, -1) * (known_rewards[:, 0] - known_rewards[:, 1])
    oracle = setting.config.oracle
    scale = 1 / oracle.temperature if oracle.noise == "bradley_terry" else None
    report = calibration.calibration(setting.judge.judged(state.lora).margins, differences, found, scale)
    hosts.on_first(files.write_json)(path, {"round": number, **report})
    print(calibration.in_words(report), flush=True)


def starting_point(
    config: ml_collections.ConfigDict, task: tasks.Task, mesh: Mesh, seed: int, folder: pathlib.Path
) -> tuple[tasks.Task, Policy]:
    """The policy that all runs of a seed begin with: after SFT, if asked for.

    Returns:
      the task too, whose base model is another one after SFT of all weights.
    """
    place, full = folder / "sft" / f"seed{seed}", config.sft.weights == "full"
    lora = start.initial_lora(config, task.decoder, mesh, seed)
    if not config.sft.data:
        return task, Policy(task.decoder, task.load_params(), lora)
    examples = sft.load(config, seed)
    inputs.hold(folder / "inputs" / f"seed{seed}_sft.json", sft.described(config, examples))
    for name, texts in (("the pool", task.candidate_texts), ("the held-out set", task.heldout)):
        if shared := shared_prompts(examples.train, texts):
            print(f"SFT data: {shared} of {examples.train.num_groups} examples have a prompt of {name}")
    # All weights are trained in float32, and are read from the stage's result once that is there.
    params: Any = {}
    if not full:
        params = task.load_params()
    elif not sft.is_done(config, place):
        params = start.load_params(config, mesh, jnp.float32)
    policy = sft.run(config, seed, examples, Policy(task.decoder, params, lora), mesh, place)
    if full:
        task = dataclasses.replace(task, base_model=str(sft.result_folder(config, place)))
    return task, policy


def described(config: ml_collections.ConfigDict, task: tasks.Task) -> dict[str, Any]:
    """What `inputs.hold` compares when a command resumes."""
    found: dict[str, Any] = {}
    if task.pool is not None:
        found["pool"] = inputs.describe_pool(task.pool, config.data.train)
    if task.prompts is not None:
        found["prompts"] = inputs.describe_texts(task.prompts.texts, config.data.train)
    found["held-out set"] = inputs.describe_pool(task.heldout, config.data.heldout or config.data.train)
    return found | start.fingerprints(config) | hosts.on_first(verbs.oracle_inputs)(config)


def evaluator(
    config: ml_collections.ConfigDict, task: tasks.Task, policy: Policy, seed: int, folder: pathlib.Path
) -> heldout.Evaluator:
    """The judge of a seed's runs: the held-out pairs, with the labels that the data has, without noise."""
    truth = answers(task.heldout, Noise(seed=seed))
    every, mesh = np.arange(task.heldout.num_pairs), policy.decoder.mesh
    assert mesh is not None
    size, packed = config.evaluation.pairs_per_chunk, specs.can_pack(config, mesh)
    batches = heldout.Batches(task.heldout, every, task.buckets, size, mesh, packed)
    saved = SavedWork(folder / "heldout" / f"seed{seed}", config.checkpoint_minutes)
    with errors.signals_wait():
        judge = heldout.Evaluator(policy, truth, batches, specs.loss_spec(config), saved)
    saved.close()
    return judge


def compare_responses(
    setting: Setting, state: RunState, folder: pathlib.Path, saved: SavedWork
) -> dict[str, Any] | None:
    """Writes `evaluation.json` and `evaluation.jsonl` of the state after the last round.

    Returns:
      what the former says; None: nothing is to be compared, or it is there already.

    Raises:
      ValueError: the evaluating reward fails, or returns something else than a finite number for each response.
    """
    config, task, number = setting.config, setting.task, int(state.round)
    name = config.evaluation.reward
    if not name or folders.is_of_round(folder / "evaluation.json", number):
        return None
    saved.enter(number, "responses")
    made = on_policy.Setting(
        setting.policy,
        start.decoding_spec(config, task.decoder, task.stop, setting.mesh),
        task.buckets,
        config.evaluation.pairs_per_chunk,
        specs.can_pack(config, setting.mesh),
        task.text_of,
    )
    prompts = on_policy.draw_prompts(task.heldout, config.evaluation.on_policy_prompts)
    compared = on_policy.compare(made, state.lora, prompts, setting.seed, saved)
    judge = hosts.on_first(rewards)
    function, texts = load_function(name, "config.evaluation.reward"), zip(*compared.texts, strict=True)
    found = np.stack([judge(function, name, list(prompts.shown), list(several)) for several in texts], axis=1)
    figures = {"round": number, "reward": name, **on_policy.figures(compared, found)}
    folders.write_evaluation(folder, figures, on_policy.lines(compared, found))
    return figures


def export(setting: Setting, state: RunState, folder: pathlib.Path) -> None:
    """The run's adapter and, on request, the merged checkpoint."""
    config, decoder, model = setting.config, setting.task.decoder, setting.task.base_model
    revision = config.model.revision if model == config.model.path else ""
    adapters.save_adapter(state.lora, decoder.lora, model, folder / "adapter", revision)
    place = folder / "merged"
    if config.export.merged and not hosts.on_first((place / "config.json").exists)():
        weights = merged.Weights(setting.policy.params, state.lora, decoder.lora)
        merged.save_merged(weights, model, revision, place, decoder.dtype)


def scalars(entry: folders.RoundSummary) -> dict[str, float]:
    """A round's figures under TensorBoard's names, `seconds/choose` say."""
    figures = {name.replace(".", "/"): value for name, value in files.flatten(entry).items() if name != "round"}
    return {name: value for name, value in figures.items() if not isinstance(value, str)}
