"""How records become token ids: through a template and a tokenizer, and cut to the longest that buckets hold."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from activedpo_jax.data.tally import Tally
from activedpo_jax.data.templates import Exchange, Template, make_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IDS_ALONE = {
    "add_special_tokens": False,
    "return_attention_mask": False,
    "return_token_type_ids": False,
    "verbose": False,
}


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How texts become tokens.

    A prompt of more than `max_prompt` tokens loses its beginning, except for BOS, on which models depend; it
    keeps its end, including the header of the assistant's turn.  A response of more than `max_response`
    tokens loses its end, including EOS.  Both are counted in the `notes`.
    """

    template: Template
    max_prompt: int
    max_response: int


def make_encoding(
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    max_prompt: int,
    max_response: int,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Encoding:
    """The encoding of a tokenizer.

    Args:
      template: `auto`, `chat` or `plain`; see `templates`.
      template_kwargs: options for the chat template.

    Raises:
      ValueError: the template does not suit the tokenizer; `max_prompt` cannot hold the assistant's header.
    """
    writer = make_template(template, tokenizer, template_kwargs)
    header = len(_ids(writer, [writer.header])[0])
    if max_prompt <= header + 1:
        raise ValueError(
            f"the longest prompt in config.data.buckets is {max_prompt} tokens; expected more than "
            f"{header + 1}, which BOS and the header of the assistant's turn take: give a larger one"
        )
    return Encoding(writer, max_prompt, max_response)


def encode(records: Sequence[Exchange], encoding: Encoding) -> tuple[list[np.ndarray], list[list[np.ndarray]], Tally]:
    """The tokens of a batch of records.

    Returns:
      for each record int32 [length] of its prompt, and of each of its responses; and what happened to them.

    Raises:
      ValueError: the template does not suit a prompt; a prompt has no tokens.
    """
    tally = Tally(records=len(records))
    prompts, responses = _whole(records, encoding.template, tally)
    lengths, others = [len(p) for p in prompts], [len(r) for several in responses for r in several]
    tally.responses, tally.longest_prompt, tally.longest_response = len(others), max(lengths), max(others, default=0)
    tally.long_prompts = sum(n > encoding.max_prompt for n in lengths)
    tally.long_responses = sum(n > encoding.max_response for n in others)
    prompts = [_last(p, encoding.max_prompt, encoding.template.tokenizer.bos_token_id) for p in prompts]
    for prompt, record in zip(prompts, records, strict=True):
        if not len(prompt):
            raise ValueError(f"{record.location}: the tokenizer makes no token of the prompt; expected some: change it")
    return prompts, [[r[: encoding.max_response] for r in several] for several in responses], tally


def _whole(
    records: Sequence[Exchange], template: Template, tally: Tally
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Token ids of every prompt and every response.

    The ids of a response are those that follow the prompt's in the whole text.  Where a token of the whole
    text spans the border, the response is tokenised on its own, as a model that continues from the
    prompt's tokens would have to write it.
    """
    texts = [template.prompt(r) for r in records]
    _count(records, texts, template, tally)
    answers = [
        [template.response(r, t, j) for j in range(len(r.responses))] for r, t in zip(records, texts, strict=True)
    ]
    flat = [(t, a) for t, several in zip(texts, answers, strict=True) for a in several]
    prompts = _ids(template, texts, [r.location for r in records])
    whole = iter(_ids(template, [t + a for t, a in flat], [r.location for r in records for _ in r.responses]))
    leading, trailing = list(template.leading), list(template.trailing)
    responses = []
    for record, prompt, several in zip(records, prompts, answers, strict=True):
        group = []
        for j, answer in enumerate(several):
            text_ids = next(whole)
            joined = text_ids[: len(prompt)] == prompt
            tally.across += not joined
            ids = text_ids[len(prompt) :] if joined else _ids(template, [answer])[0]
            ends = record.extras.is_cut(j) or (trailing and ids[-len(trailing) :] == trailing)
            group.append(np.array(ids if ends else ids + trailing, np.int32))
        responses.append(group)
    begun = [bool(leading) and p[: len(leading)] == leading for p in prompts]
    return [np.array(p if b else leading + p, np.int32) for p, b in zip(prompts, begun, strict=True)], responses


def _count(records: Sequence[Exchange], texts: Sequence[str], template: Template, tally: Tally) -> None:
    """Counts what the chat template does not write, and texts with a beginning or end of sequence of their own."""
    begin, ends = template.begin, template.ends
    for record, text in zip(records, texts, strict=True):
        for name in template.unwritten(record, text):
            count, first = tally.left_out.get(name, (0, record.location))
            tally.left_out[name] = count + 1, first
        tally.begun += isinstance(record.prompt, str) and bool(begin) and record.prompt.startswith(begin)
        tally.ended += sum(bool(ends) and response.rstrip().endswith(ends) for response in record.responses)


def _ids(template: Template, texts: list[str], locations: Sequence[str] = ("",)) -> list[list[int]]:
    """Token ids of texts; `locations` are for errors that the tokenizer raises."""
    if not texts:
        return []
    try:
        return template.tokenizer(texts, **_IDS_ALONE)["input_ids"]
    except Exception as error:  # tokenizers raise errors of any type
        for text, location in zip(texts, locations, strict=False):
            try:
                template.tokenizer([text], **_IDS_ALONE)
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
