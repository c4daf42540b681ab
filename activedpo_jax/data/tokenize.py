"""From records to token ids: texts to learn from, and the pool of pairs that everything downstream works on."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from activedpo_jax.data.groups import PairPool, Texts
from activedpo_jax.data.preferences import Record, prompt_key, shown_pairs
from activedpo_jax.data.templates import Exchange, Template, make_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_texts(
    records: Sequence[Exchange],
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    max_prompt: int,
    max_response: int,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Texts:
    """One group per record, in order.

    A prompt of more than `max_prompt` tokens loses its beginning, except for BOS, on which models depend; it
    keeps its end, including the header of the assistant's turn.  A response of more than `max_response`
    tokens loses its end, including EOS.  Both are counted in the `notes`.

    Args:
      template: `auto`, `chat` or `plain`; see `templates`.
      template_kwargs: options for the chat template.

    Raises:
      ValueError: the template does not suit the tokenizer or a prompt; `max_prompt` cannot hold the
        assistant's header; a prompt has no tokens.
    """
    writer = make_template(template, tokenizer, template_kwargs)
    prompts, responses, notes = _encode(records, writer)
    header = len(_ids(writer, [writer.header])[0])
    if max_prompt <= header + 1:
        raise ValueError(
            f"the longest prompt in config.data.buckets is {max_prompt} tokens; expected more than "
            f"{header + 1}, which BOS and the header of the assistant's turn take: give a larger one"
        )
    notes += _truncation("prompts", "beginning", [len(p) for p in prompts], max_prompt)
    notes += _truncation("responses", "end, EOS included", [len(r) for rs in responses for r in rs], max_response)
    prompts = [_last(p, max_prompt, tokenizer.bos_token_id) for p in prompts]
    for prompt, record in zip(prompts, records, strict=True):
        if not len(prompt):
            raise ValueError(f"{record.location}: the tokenizer makes no token of the prompt; expected some: change it")
    return Texts(
        prompt_tokens=prompts, response_tokens=[[r[:max_response] for r in rs] for rs in responses], notes=notes
    )


def tokenize(
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    max_prompt: int,
    max_response: int,
    seed: int,
    template_kwargs: Mapping[str, Any] | None = None,
) -> PairPool:
    """`tokenize_texts`, and all pairs of a record's responses in the order of `group_pairs`.

    Which response is shown first depends on the seed and the pair's id alone.

    Raises:
      ValueError: see `tokenize_texts`; or two pairs have the same id.
    """
    texts = tokenize_texts(records, tokenizer, template, max_prompt, max_response, template_kwargs)
    responses, notes = texts.response_tokens, list(texts.notes)
    pairs, pair_ids = shown_pairs(records, seed)
    preferences, rewards = [], []
    same = ties = 0
    for g, first, second in pairs:
        record, given = records[g], records[g].rewards
        preferences.append(-1 if record.preferred is None else int(record.preferred == second))
        rewards.append((given[first], given[second]) if given else (np.nan, np.nan))
        same += np.array_equal(responses[g][first], responses[g][second])
        ties += record.preferred is None and given is not None and given[first] == given[second]
    notes += _copies(records, pairs, preferences)
    if same:
        notes.append(f"{same} of {len(pairs)} pairs have two responses of the same tokens: nothing can be learnt there")
    if ties:
        notes.append(f"{ties} of {len(pairs)} pairs have equal rewards and no preference: a coin decides, by their id")
    return PairPool(
        prompt_tokens=texts.prompt_tokens,
        response_tokens=responses,
        pairs=np.array(pairs, np.int32),
        pair_ids=pair_ids,
        preferences=np.array(preferences, np.int8),
        rewards=None if np.all(np.isnan(rewards)) else np.array(rewards, np.float32),
        prompt_texts=[r.prompt for r in records],
        response_texts=[r.responses for r in records],
        notes=notes,
    )


def _encode(
    records: Sequence[Exchange], template: Template
) -> tuple[list[np.ndarray], list[list[np.ndarray]], list[str]]:
    """Token ids of every prompt and every response, and notes.

    The ids of a response are those that follow the prompt's in the whole text.  Where a token of the whole
    text spans the border, the response is tokenised on its own, as a model that continues from the
    prompt's tokens would have to write it.
    """
    texts = [template.prompt(r) for r in records]
    notes = _left_out(records, texts, template)
    answers = [
        [template.response(r, t, j) for j in range(len(r.responses))] for r, t in zip(records, texts, strict=True)
    ]
    notes += _markers(records, template)
    flat = [(t, a) for t, several in zip(texts, answers, strict=True) for a in several]
    prompts = _ids(template, texts, [r.location for r in records])
    whole = iter(_ids(template, [t + a for t, a in flat], [r.location for r in records for _ in r.responses]))
    leading, trailing = list(template.leading), list(template.trailing)
    responses, across = [], 0
    for record, prompt, several in zip(records, prompts, answers, strict=True):
        group = []
        for j, answer in enumerate(several):
            text_ids = next(whole)
            joined = text_ids[: len(prompt)] == prompt
            across += not joined
            ids = text_ids[len(prompt) :] if joined else _ids(template, [answer])[0]
            ends = record.extras.is_cut(j) or (trailing and ids[-len(trailing) :] == trailing)
            group.append(np.array(ids if ends else ids + trailing, np.int32))
        responses.append(group)
    if across:
        notes.append(
            f"{across} of {len(flat)} responses were tokenised apart from their prompts, since a token would "
            "have lain across the border"
        )
    begun = [bool(leading) and p[: len(leading)] == leading for p in prompts]
    return [np.array(p if b else leading + p, np.int32) for p, b in zip(prompts, begun, strict=True)], responses, notes


def _left_out(records: Sequence[Exchange], texts: Sequence[str], template: Template) -> list[str]:
    """Counts what the chat template does not write: nothing is dropped in silence."""
    missing: dict[str, list[str]] = {}
    for record, text in zip(records, texts, strict=True):
        for name in template.unwritten(record, text):
            missing.setdefault(name, []).append(record.location)
    return [
        f"{len(places)} of {len(records)} records have {name}, which the chat template leaves out (first: {places[0]})"
        for name, places in missing.items()
    ]


def _markers(records: Sequence[Exchange], template: Template) -> list[str]:
    """Counts texts with a beginning or end of sequence of their own, which is not written a second time."""
    bos, eos = (str(token or "") for token in (template.tokenizer.bos_token, template.tokenizer.eos_token))
    begun = sum(isinstance(r.prompt, str) and bool(bos) and r.prompt.startswith(bos) for r in records)
    ends = tuple({eos, template.end.strip()} - {""})
    ended = sum(bool(ends) and text.rstrip().endswith(ends) for r in records for text in r.responses)
    notes = [f"{begun} of {len(records)} prompts begin with {bos!r} themselves: it is not added again"] if begun else []
    if ended:
        total = sum(len(r.responses) for r in records)
        notes.append(f"{ended} of {total} responses end in {' or '.join(ends)} themselves: it is not added again")
    return notes


def _ids(template: Template, texts: list[str], locations: Sequence[str] = ("",)) -> list[list[int]]:
    """Token ids of texts; `locations` are for errors that the tokenizer raises."""
    if not texts:
        return []
    try:
        return template.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # tokenizers raise errors of any type
        for text, location in zip(texts, locations, strict=False):
            try:
                template.tokenizer([text], add_special_tokens=False, verbose=False)
            except Exception as cause:
                raise ValueError(
                    f"{location}: the tokenizer does not take this text ({type(cause).__name__}: {cause}); change it"
                ) from error
        raise


def _last(prompt: np.ndarray, size: int, bos: int | None) -> np.ndarray:
    if len(prompt) <= size:
        return prompt
    keep_bos = int(bos is not None and prompt[0] == bos)
    return np.concatenate([prompt[:keep_bos], prompt[len(prompt) - size + keep_bos :]])


def _truncation(kind: str, lost: str, lengths: list[int], size: int) -> list[str]:
    """A note on what was cut, if anything was."""
    longer = sum(n > size for n in lengths)
    if not longer:
        return []
    return [
        f"{longer} of {len(lengths)} {kind} ({longer / len(lengths):.1%}) are longer than {size} tokens "
        f"(up to {max(lengths)}) and lost their {lost}: see config.data.buckets"
    ]


def _copies(records: Sequence[Record], pairs: Sequence[tuple[int, int, int]], preferences: Sequence[int]) -> list[str]:
    """Counts pairs of texts that occur again, in either order, and those of them with another label."""
    first: dict[tuple[str, ...], str | None] = {}
    again = opposite = 0
    for (group, *shown), preference in zip(pairs, preferences, strict=True):
        record = records[group]
        texts = [record.responses[j].strip() for j in shown]
        better = texts[preference] if preference >= 0 else None
        key = (prompt_key(record.prompt), *sorted(texts))
        if key in first:
            again += 1
            opposite += None not in (better, first[key]) and better != first[key]
        else:
            first[key] = better
    if not again:
        return []
    return [
        f"{again} of {len(pairs)} pairs are there a second time, {opposite} with the opposite label: each costs a label"
    ]
