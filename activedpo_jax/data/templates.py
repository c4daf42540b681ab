"""Templates: how a prompt and its responses become text for a tokenizer.

`chat` renders them with the tokenizer's own chat template; `plain`, for base models, takes them as they are.
In both, a response is what the model itself would write after the prompt: the text, then the end of its turn,
and nothing that the template puts after that (`...<|im_end|>`, without the newline).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from activedpo_jax.data.fields import Extras, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = ("auto", "chat", "plain")


class Exchange(Protocol):
    """What a template writes: a prompt and its responses, with their location for error messages."""

    @property
    def prompt(self) -> Prompt: ...

    @property
    def responses(self) -> Sequence[str]: ...

    @property
    def location(self) -> str: ...

    @property
    def extras(self) -> Extras: ...

    @property
    def implicit(self) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Template:
    """Writes a prompt and its responses for one tokenizer.

    A prompt's ids are `leading`, then those of its text; a response's are those of its text, then `trailing`.
    Texts are tokenised as they are: the tokenizer adds no special tokens of its own.
    """

    tokenizer: "PreTrainedTokenizerBase"
    chat: bool
    leading: tuple[int, ...]  # ids before the prompt, such as BOS, unless the text has them
    trailing: tuple[int, ...]  # ids after a response, likewise
    header: str  # what opens the assistant's turn at the end of a prompt, if anything
    tail: str  # what the chat template puts after a response
    end: str  # the part of `tail` that the model writes
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for the chat template, for every record

    def prompt(self, record: Exchange) -> str:
        """The prompt's text, up to where the response begins.

        Raises:
          ValueError: the template cannot write such a prompt.
        """
        if self.chat:
            if record.implicit:
                raise ValueError(
                    f"{record.location}: there is no `prompt`, and strings have no turn at whose border a chat "
                    "template could begin a response; expected `prompt`, or lists of chat messages: add `prompt`, or "
                    "set config.data.template=plain"
                )
            if isinstance(record.prompt, str) and self.header.strip() and self.header.strip() in record.prompt:
                raise ValueError(
                    f"{record.location}: the prompt has {self.header.strip()!r} in it, so a chat template has written "
                    "it already, and would again; expected the text alone: set config.data.template=plain, or change it"
                )
            return self._render(record, _messages(self.unmarked(record.prompt)), True)
        if record.extras.tools or record.extras.template_kwargs or any(record.extras.messages):
            raise ValueError(
                f"{record.location}: there are tools, chat_template_kwargs or fields of a message beside role and "
                "content, which only a chat template can write: set config.data.template=chat, or remove them"
            )
        if not isinstance(record.prompt, str):
            raise ValueError(
                f"{record.location}: the prompt is a list of chat messages; expected a string, since this run has "
                "no chat template: set config.data.template=chat with a tokenizer that has one, or give a string"
            )
        return record.prompt

    def response(self, record: Exchange, prompt: str, index: int) -> str:
        """The text of one response, with the end of the turn; `prompt` is what `prompt()` gave.

        Raises:
          ValueError: the chat template does not write a conversation as prompt, then response, or changes the
            response.
        """
        if not self.chat:
            return record.responses[index]
        text = self.unmarked(record.responses[index])
        answer = {"role": "assistant", "content": text, **record.extras.message(index)}
        whole = self._render(record, [*_messages(self.unmarked(record.prompt)), answer], False)
        if not whole.startswith(prompt) or not whole.endswith(self.tail):
            raise ValueError(
                f"{record.location}: the chat template does not write this conversation as the prompt "
                f"(ending in {prompt[-40:]!r}), then the response (ending in {self.tail!r}); got "
                f"{whole[-200:]!r}: set config.data.template=plain, or use a tokenizer whose template does"
            )
        written = whole[len(prompt) : len(whole) - len(self.tail)]
        if text.strip() not in written:
            raise ValueError(
                f"{record.location}: the chat template leaves out some of the response; expected "
                f"{text.strip()[:200]!r}, got {written[:200]!r}: set config.data.template=plain, use another template, "
                "or change the response"
            )
        return written if record.extras.is_cut(index) else written + self.end

    def unmarked(self, content: Any) -> Any:
        """A string without the BOS and the end of turn that the chat template writes itself."""
        if not self.chat or not isinstance(content, str):
            return content
        content = content.removeprefix(self.begin)
        for end in self.ends:
            if content.rstrip().endswith(end):
                content = content.rstrip().removesuffix(end)
        return content

    # The tokenizer's attributes are slow to read, and there may be millions of texts.
    @functools.cached_property
    def begin(self) -> str:
        """How the beginning of a sequence is written, if there is a token for it."""
        return str(self.tokenizer.bos_token or "")

    @functools.cached_property
    def ends(self) -> tuple[str, ...]:
        """How the end of a sequence or of a turn is written."""
        return tuple(sorted({self.end.strip(), str(self.tokenizer.eos_token or "")} - {""}))

    def unwritten(self, record: Exchange, text: str) -> list[str]:
        """What the chat template silently leaves out: `tools`, `tool_calls`, ..., or the text of a message.

        Args:
          text: what `prompt()` gave.
        """
        if not self.chat:
            return []
        messages, extras = _messages(self.unmarked(record.prompt)), record.extras
        missing = []
        if any(m["content"].strip() and m["content"].strip() not in text for m in messages):
            missing.append("the whole text of every message of the prompt")
        if extras.tools and self._render(record, messages, True, dataclasses.replace(extras, tools=None)) == text:
            missing.append("tools")
        if extras.template_kwargs:
            bare_options = dataclasses.replace(extras, template_kwargs={})
            if self._render(record, messages, True, bare_options) == text:
                missing.append("chat_template_kwargs")
        answers = [
            [*messages, {"role": "assistant", "content": response, **extras.message(j)}]
            for j, response in enumerate(record.responses)
            if extras.message(j)
        ]
        for conversation in (messages, *answers):
            for i, message in enumerate(conversation):
                for name in message.keys() - {"role", "content"}:
                    bare = [*conversation]
                    bare[i] = {k: v for k, v in message.items() if k != name}
                    try:
                        same = self._render(record, bare, False) == self._render(record, conversation, False)
                    except ValueError:
                        continue  # the template requires the field
                    if same and name not in missing:
                        missing.append(name)
        return missing

    def _render(self, record: Exchange, messages: list[Any], generate: bool, extras: Extras | None = None) -> str:
        extras = record.extras if extras is None else extras
        options = {**self.options, **extras.template_kwargs}
        try:
            return _render(self.tokenizer, messages, generate, extras.tools, options)
        except Exception as error:  # templates raise errors of any type: no system role, no two users in a row
            raise ValueError(
                f"{record.location}: the chat template does not take this conversation ({error}); "
                "expected roles in an order that it takes: change them, or set config.data.template=plain"
            ) from error


def make_template(
    name: str, tokenizer: "PreTrainedTokenizerBase", options: Mapping[str, Any] | None = None
) -> Template:
    """The template of that name for a tokenizer.

    Args:
      name: `chat`, `plain`, or `auto`: chat if the tokenizer has a chat template, else plain.
      options: for the chat template, such as `enable_thinking`; a record's own take precedence.

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
    return _chat(tokenizer, options or {})


def _chat(tokenizer: "PreTrainedTokenizerBase", options: Mapping[str, Any]) -> Template:
    """Finds out what the chat template writes around a response, from one that cannot be its own text.

    Raises:
      ValueError: it takes none of the conversations tried, or does not write one as prompt, then response.
    """
    mark = "0response0"
    user, system = {"role": "user", "content": "Hello"}, {"role": "system", "content": "Answer."}
    question, refusal = None, None
    for question in ([user], [system, user]):  # some templates ask for a system message
        try:
            prompt = _render(tokenizer, question, True, None, options)
            whole = _render(tokenizer, [*question, {"role": "assistant", "content": mark}], False, None, options)
            break
        except Exception as error:  # templates raise errors of any type
            refusal = error
    else:
        raise ValueError(
            f"the tokenizer's chat template takes no question of a user with an answer ({type(refusal).__name__}: "
            f"{refusal}); expected one that does: set config.data.template=plain, or use another tokenizer"
        ) from refusal
    if not whole.startswith(prompt) or mark not in whole[len(prompt) :]:
        raise ValueError(
            f"the tokenizer's chat template writes {prompt!r} as a prompt and {whole!r} with a "
            "response; expected the second to begin with the first: set config.data.template=plain, or use "
            "another tokenizer"
        )
    tail = whole[whole.rindex(mark) + len(mark) :]
    asked = _render(tokenizer, question, False, None, options)
    header = prompt[len(asked) :] if prompt.startswith(asked) else ""
    # Includes tokens that are not flagged special: some tokenizers do not flag the one that ends a turn.
    specials = {t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip()}
    ends = [tail.index(s) + len(s) for s in specials if s in tail]
    if ends:
        return Template(tokenizer, True, (), (), header, tail, tail[: min(ends)], options)
    return Template(tokenizer, True, (), (_eos(tokenizer),), header, tail, "", options)


def _eos(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, without which responses have no end; "
            "expected `eos_token` in the tokenizer_config.json of config.model.path: add it"
        )
    return int(tokenizer.eos_token_id)


def _messages(prompt: Prompt) -> list[Any]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Any], generate: bool, tools: Any, options: Mapping[str, Any]
) -> str:
    tools = None if tools is None else list(tools)
    return str(
        tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=generate, tokenize=False, **options)
    )
