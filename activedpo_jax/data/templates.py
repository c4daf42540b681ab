"""Templates: how a prompt and its responses become text for a tokenizer.

`chat` renders them by the tokenizer's own chat template; `plain`, for base models, takes them as they are.
In both, a response is what the model itself would write after the prompt: the text, then the end of its turn,
and nothing that the template puts behind that (`...<|im_end|>`, without the newline).
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from activedpo_jax.data.fields import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = ("auto", "chat", "plain")


class Exchange(Protocol):
    """What a template writes: a prompt, what is said to it, and where both stand, for error messages."""

    @property
    def prompt(self) -> Prompt: ...

    @property
    def responses(self) -> Sequence[str]: ...

    @property
    def where(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Template:
    """Writes a prompt and its responses for one tokenizer.

    A prompt's ids are `leading` and those of its text; a response's are those of its text and `trailing`.
    Texts are tokenised as they are: the tokenizer adds no special tokens of its own.
    """

    tokenizer: "PreTrainedTokenizerBase"
    chat: bool
    leading: tuple[int, ...]  # ids before the prompt, such as BOS, where the text does not have them
    trailing: tuple[int, ...]  # ids after a response, likewise
    header: str  # what opens the assistant's turn at the end of a prompt, if anything
    tail: str  # what the chat template puts behind a response
    end: str  # the part of it that the model writes

    def prompt(self, record: Exchange) -> str:
        """The prompt's text, up to where the response begins.

        Raises:
          ValueError: the template does not take such a prompt.
        """
        if self.chat:
            return self._render(record, _messages(record.prompt), True)
        if not isinstance(record.prompt, str):
            raise ValueError(
                f"{record.where}: the prompt is a list of chat messages; expected a string, since this run has "
                "no chat template: set config.data.template=chat with a tokenizer that has one, or give a string"
            )
        return record.prompt

    def response(self, record: Exchange, prompt: str, index: int) -> str:
        """The text of one response, with the end of the turn; `prompt` is what `prompt()` gave.

        Raises:
          ValueError: the chat template does not write a conversation as prompt, then response.
        """
        if not self.chat:
            return record.responses[index]
        answer = {"role": "assistant", "content": record.responses[index]}
        whole = self._render(record, [*_messages(record.prompt), answer], False)
        if not whole.startswith(prompt) or not whole.endswith(self.tail):
            raise ValueError(
                f"{record.where}: the chat template does not write this conversation as the prompt "
                f"(ending in {prompt[-40:]!r}), then the response (ending in {self.tail!r}); got "
                f"{whole[-200:]!r}: set config.data.template=plain, or use a tokenizer whose template does"
            )
        return whole[len(prompt) : len(whole) - len(self.tail)] + self.end

    def _render(self, record: Exchange, messages: list[Any], generate: bool) -> str:
        try:
            return _render(self.tokenizer, messages, generate)
        except Exception as error:  # templates raise what they like: no system role, no two users in a row
            raise ValueError(
                f"{record.where}: the chat template does not take this conversation ({error}); "
                "expected roles in an order that it takes: change them, or set config.data.template=plain"
            ) from error


def make_template(name: str, tokenizer: "PreTrainedTokenizerBase") -> Template:
    """The template of that name for a tokenizer.

    Args:
      name: `chat`, `plain`, or `auto`: chat if the tokenizer has a chat template, else plain.

    Raises:
      ValueError: the name is none of these, or the tokenizer lacks what it needs.
    """
    if name not in NAMES:
        raise ValueError(f"config.data.template is {name!r}; expected one of {', '.join(NAMES)}")
    if name == "chat" and not tokenizer.chat_template:
        raise ValueError(
            "config.data.template is 'chat', but the tokenizer has no chat template; "
            "expected one in config.model.path: set config.data.template=plain for a base model"
        )
    if name == "plain" or not tokenizer.chat_template:
        # The first id of any text tells whether the tokenizer puts BOS before it.
        with_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        leading = (tokenizer.bos_token_id,) if with_bos else ()
        return Template(tokenizer, False, leading, (_eos(tokenizer),), "", "", "")
    return _chat(tokenizer)


def _chat(tokenizer: "PreTrainedTokenizerBase") -> Template:
    """Finds out what the chat template writes around a response, from one that it cannot have of its own."""
    question, mark = [{"role": "user", "content": "Hello"}], "0response0"
    prompt = _render(tokenizer, question, True)
    whole = _render(tokenizer, [*question, {"role": "assistant", "content": mark}], False)
    if not whole.startswith(prompt) or mark not in whole[len(prompt) :]:
        raise ValueError(
            f"the tokenizer's chat template writes {prompt!r} as a prompt and {whole!r} with a "
            "response; expected the second to begin with the first: set config.data.template=plain, or use "
            "another tokenizer"
        )
    tail = whole[whole.rindex(mark) + len(mark) :]
    asked = _render(tokenizer, question, False)
    header = prompt[len(asked) :] if prompt.startswith(asked) else ""
    # Also tokens that are not flagged special: some tokenizers do not flag the one that ends a turn.
    specials = {t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip()}
    ends = [tail.index(s) + len(s) for s in specials if s in tail]
    if ends:
        return Template(tokenizer, True, (), (), header, tail, tail[: min(ends)])
    return Template(tokenizer, True, (), (_eos(tokenizer),), header, tail, "")


def _eos(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, without which responses have no end; "
            "expected `eos_token` in the tokenizer_config.json of config.model.path: add it"
        )
    return int(tokenizer.eos_token_id)


def _messages(prompt: Prompt) -> list[Any]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _render(tokenizer: "PreTrainedTokenizerBase", messages: list[Any], generate: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False))
