"""What the templates write is what the tokenizer's own chat template writes, cut where the model's turn ends."""

from typing import Any

import pytest

from activedpo_jax.data.preferences import Prompt, Record
from activedpo_jax.data.templates import make_template
from tests.tiny_tokenizer import CHATML, make_tokenizer

USER = {"role": "user", "content": "the sky?"}
SYSTEM = {"role": "system", "content": "be blue"}


def make(prompt: Prompt, *responses: str) -> Record:
    return Record("id", prompt, responses, None, None, "data.jsonl:7")


LOOP = "{% for m in messages %}"
HEADERS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("chat_template", "prompt", "response", "trailing"),
    [
        # A newline after the end of the turn is the template's, not the model's.
        (CHATML, "<|im_start|>user\nthe sky?<|im_end|>\n<|im_start|>assistant\n", " is\nblue <|im_end|>", ""),
        # The template strips what it is given (as Llama 3's does), and ends the turn without a newline.
        (
            "{{ '<s>' }}" + LOOP + "{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|end|>' }}"
            "{% endfor %}" + HEADERS,
            "<s><|im_start|>user\n\nthe sky?<|end|><|im_start|>assistant\n\n",
            "is\nblue<|end|>",
            "",
        ),
        # There is no header, spaces lie around the response, and `add_generation_prompt` means nothing (Mistral's).
        (
            "{{ '<s>' }}" + LOOP + "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else "
            "' ' + m['content'] + ' </s>' }}{% endfor %}",
            "<s>[INST] the sky? [/INST]",
            "  is\nblue  </s>",
            "",
        ),
        # The document's end comes after the turn's end, which is where the model stops (Phi's).
        (
            LOOP + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
            "{{ '<|im_start|>assistant\n' if add_generation_prompt else '</s>' }}",
            "<|im_start|>user\nthe sky?<|end|>\n<|im_start|>assistant\n",
            " is\nblue <|end|>",
            "",
        ),
        # Nothing ends a turn, so that EOS has to.
        (
            LOOP + "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
            "user: the sky?\nassistant: ",
            " is\nblue ",
            "</s>",
        ),
    ],
)
def test_chat_templates(chat_template: str, prompt: str, response: str, trailing: str) -> None:
    tokenizer = make_tokenizer(chat_template)
    template, record = make_template("auto", tokenizer), make("the sky?", " is\nblue ", "y")
    assert template.prompt(record) == prompt
    assert template.response(record, prompt, 0) == response
    assert template.prompt(make([USER])) == prompt
    assert list(template.trailing) == tokenizer.convert_tokens_to_ids([trailing] if trailing else [])
    assert template.leading == ()


def test_header_is_what_opens_the_assistants_turn() -> None:
    assert make_template("chat", make_tokenizer(CHATML)).header == "<|im_start|>assistant\n"
    assert make_template("plain", make_tokenizer(CHATML)).header == ""


def test_system_message_and_several_turns() -> None:
    tokenizer = make_tokenizer(CHATML)
    conversation = [SYSTEM, USER, {"role": "assistant", "content": "is"}, USER]
    record = make(conversation, "x", "y")
    template = make_template("chat", tokenizer)
    prompt = template.prompt(record)
    whole = tokenizer.apply_chat_template([*conversation, {"role": "assistant", "content": "y"}], tokenize=False)
    assert prompt + template.response(record, prompt, 1) + "\n" == whole


@pytest.mark.parametrize("bos", [False, True])
def test_plain(bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos)
    template, record = make_template("auto", tokenizer), make("the sky", " is blue", " is green")
    assert template.prompt(record) == "the sky"
    assert template.response(record, "the sky", 1) == " is green"
    assert list(template.leading) == ([tokenizer.bos_token_id] if bos else [])
    assert list(template.trailing) == [tokenizer.eos_token_id]


def test_auto_takes_the_chat_template_if_there_is_one() -> None:
    assert make_template("auto", make_tokenizer(CHATML)).chat
    assert not make_template("auto", make_tokenizer()).chat
    assert not make_template("plain", make_tokenizer(CHATML)).chat


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chatml", {}, "config.data.template is 'chatml'; expected one of auto, chat, plain"),
        ("chat", {}, "no chat template; .* set config.data.template=plain"),
        ("plain", {"eos": None}, "no end-of-sequence token.*add it"),
        ("chat", {"chat_template": "{{ messages | length }}"}, "expected the second to begin with the first"),
    ],
)
def test_tokenizers_that_do_not_do(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_template(name, make_tokenizer(**options))


def test_prompts_that_the_template_does_not_take() -> None:
    with pytest.raises(ValueError, match="data.jsonl:7: the prompt is a list of chat messages; expected a string"):
        make_template("plain", make_tokenizer()).prompt(make([USER]))
    picky = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(ValueError, match="data.jsonl:7: the chat template does not take .*no system role.*roles"):
        make_template("chat", make_tokenizer(picky)).prompt(make([SYSTEM, USER]))


def test_a_template_that_rewrites_the_prompt_once_there_is_a_response() -> None:
    # It shows the system message only while nobody has answered.
    fickle = (
        "{% for m in messages %}{% if m['role'] != 'system' or add_generation_prompt %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    template, record = make_template("chat", make_tokenizer(fickle)), make([SYSTEM, USER], "x", "y")
    with pytest.raises(ValueError, match="data.jsonl:7: the chat template does not write this .*template=plain"):
        template.response(record, template.prompt(record), 0)
