"""Inputs that once changed between the file and the tokens without a word: each is taken whole, counted, or refused.

The small files of `cases/`, where they are beside the repository, and inputs of the same kinds made here.
"""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from activedpo_jax.data.completions import read_completions
from activedpo_jax.data.encoding import make_encoding
from activedpo_jax.data.groups import PairPool, Texts, check_tokens
from activedpo_jax.data.prompts import read_prompts
from activedpo_jax.data.records import read_records
from activedpo_jax.data.tokenize import encoded_pool, encoded_texts
from tests.tiny_tokenizer import CHATML, make_tokenizer

CASES = pathlib.Path(__file__).parents[2] / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not beside the repository")

PROMPT = "What colour is the sky?"
# Writes everything that it is given.
EVERYTHING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if enable_thinking is defined %}[{{ enable_thinking }}]{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['name'] | default('') + '\n' }}"
    "{% if m['reasoning_content'] %}{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}{{ m['content'] }}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant \n' }}{% endif %}"
)
CUTS_THINKING = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Rome"}}}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def read(path: pathlib.Path, *rows: dict[str, Any]) -> Any:
    file = path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records(str(file))


def pool_of(records: Any, tokenizer: Any, template: str = "auto", **options: Any) -> PairPool:
    return encoded_pool(records, make_encoding(tokenizer, template, 1000, 1000, options), 0)


def texts_of(pool: Texts, tokenizer: Any) -> tuple[list[str], list[list[str]]]:
    return (
        [tokenizer.decode(ids) for ids in pool.prompt_tokens],
        [[tokenizer.decode(ids) for ids in several] for several in pool.response_tokens],
    )


def pair(**more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "chosen": "It is blue", "rejected": "Not today", **more}


# --- Text that no tokenizer takes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "a \ud83d b"),
        ("chosen", "here \ud83d it is"),
        ("rejected", [{"role": "assistant", "content": "\udc00"}]),
        ("prompt", [{"role": "user", "content": "x", "name": "\ud83d"}]),
        ("tools", [{"name": "\ud83d"}]),
    ],
)
def test_lone_surrogates_are_named(tmp_path: pathlib.Path, field: str, value: Any) -> None:
    row = pair()
    if field == "rejected":
        row["chosen"] = [{"role": "assistant", "content": "It is blue"}]
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: .* lone surrogate"):
        read(tmp_path, pair(), {**row, field: value})


@needs_cases
def test_the_case_of_a_lone_surrogate() -> None:
    with pytest.raises(ValueError, match=r"lone_surrogate\.jsonl:1: chosen has the lone surrogate"):
        read_records(str(CASES / "lone_surrogate.jsonl"))


# --- What goes to the chat template


def test_tools_calls_and_options_reach_the_template(tmp_path: pathlib.Path) -> None:
    tokenizer = make_tokenizer(EVERYTHING, eos="<|im_end|>")
    asked = [{"role": "user", "content": PROMPT}]
    messages = [*asked, {"role": "assistant", "content": "", "tool_calls": CALL}, {"role": "tool", "content": "rain"}]
    chosen = [{"role": "assistant", "content": "Let me look", "tool_calls": CALL, "reasoning_content": "hm"}]
    rejected = [{"role": "assistant", "content": "Let me see"}]
    row = {"prompt": messages, "chosen": chosen, "rejected": rejected, "tools": TOOLS}
    pool = pool_of(read(tmp_path, {**row, "chat_template_kwargs": {"enable_thinking": False}}), tokenizer)
    prompt, (responses,) = texts_of(pool, tokenizer)
    expected = tokenizer.apply_chat_template(
        messages, tools=TOOLS, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    assert prompt == [expected] and "Rome" in expected and "[False]" in expected
    whole = tokenizer.apply_chat_template([*messages, *chosen], tools=TOOLS, tokenize=False, enable_thinking=False)
    assert expected + responses[0] + "\n" == whole and "hm" in responses[0] and "Rome" in responses[0]
    assert not pool.notes


def test_options_of_the_config_reach_the_template_and_a_record_has_the_last_word(tmp_path: pathlib.Path) -> None:
    tokenizer = make_tokenizer(EVERYTHING, eos="<|im_end|>")
    records = read(tmp_path, pair(), pair(prompt="Hello", chat_template_kwargs={"enable_thinking": True}))
    prompts, _ = texts_of(pool_of(records, tokenizer, enable_thinking=False), tokenizer)
    assert prompts[0].startswith("[False]") and prompts[1].startswith("[True]")


def test_what_a_template_leaves_out_is_counted(tmp_path: pathlib.Path) -> None:
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    chosen = [{"role": "assistant", "content": "Let me look", "tool_calls": CALL}]
    rejected = [{"role": "assistant", "content": "Not today"}]
    row = pair(chosen=chosen, rejected=rejected, tools=TOOLS, chat_template_kwargs={"enable_thinking": False})
    notes = "\n".join(pool_of(read(tmp_path, row, pair(prompt="Hello")), tokenizer).notes)
    for name in ("tools", "tool_calls", "chat_template_kwargs"):
        assert f"1 of 2 records have {name}, which the chat template leaves out (first: {tmp_path}" in notes


@needs_cases
@pytest.mark.parametrize("name", ["tool_calls_in_prompt", "tool_call_in_response", "chat_template_kwargs"])
def test_the_cases_of_tools_and_options(name: str) -> None:
    records = read_records(str(CASES / f"{name}.jsonl"))
    whole = pool_of(records, make_tokenizer(EVERYTHING, eos="<|im_end|>"))
    left_out = pool_of(records, make_tokenizer(CHATML, eos="<|im_end|>"))
    assert not whole.notes
    assert any("6 of 6 records have" in note and "leaves out" in note for note in left_out.notes)
    with pytest.raises(ValueError, match=rf"{name}\.jsonl:1: .*config\.data\.template=chat"):
        pool_of(records, make_tokenizer(), "plain")


def test_a_plain_template_refuses_what_it_cannot_write(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: there are tools, chat_template_kwargs"):
        pool_of(read(tmp_path, pair(tools=TOOLS)), make_tokenizer(), "plain")


def test_sft_data_and_prompts_carry_the_same(tmp_path: pathlib.Path) -> None:
    tokenizer = make_tokenizer(EVERYTHING, eos="<|im_end|>")
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(pair(tools=TOOLS)) + "\n")
    encoding = make_encoding(tokenizer, "chat", 999, 999)
    for records in (read_completions(str(file)), read_records(str(file))):
        assert "weather" in texts_of(encoded_texts(records, encoding), tokenizer)[0][0]
    file.write_text(json.dumps({"prompt": PROMPT, "tools": TOOLS}) + "\n")
    prompts = encoded_texts(read_prompts(str(file)), encoding)
    assert "weather" in tokenizer.decode(prompts.prompt_tokens[0])


# --- What a template makes of a response


def test_a_template_that_cuts_a_response_is_refused(tmp_path: pathlib.Path) -> None:
    row = pair(chosen="<think>the sky is\n</think>It is blue")
    tokenizer = make_tokenizer(CUTS_THINKING, eos="<|im_end|>")
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: the chat template leaves out some of the response"):
        pool_of(read(tmp_path, row), tokenizer)


@needs_cases
def test_the_case_of_thinking_that_is_cut() -> None:
    tokenizer = make_tokenizer((CASES / "thinking_cut_template.jinja").read_text(), eos="<|im_end|>")
    records = read_records(str(CASES / "thinking.jsonl"))
    with pytest.raises(ValueError, match=r"thinking\.jsonl:1: the chat template leaves out some of the response"):
        pool_of(records, tokenizer)
    # And one that keeps it keeps all of it.
    tokenizer = make_tokenizer(CHATML, eos="<|im_end|>")
    _, responses = texts_of(pool_of(records, tokenizer), tokenizer)
    for record, several in zip(records, responses, strict=True):
        assert several == [f"{text}<|im_end|>" for text in record.responses]


def test_a_template_that_raises_on_everything_is_named(tmp_path: pathlib.Path) -> None:
    tokenizer = make_tokenizer("{{ raise_exception('nothing suits me') }}", eos="<|im_end|>")
    with pytest.raises(ValueError, match=r"nothing suits me\); expected .* config\.data\.template=plain"):
        pool_of(read(tmp_path, pair()), tokenizer)


def test_a_template_that_wants_a_system_message_works_where_there_is_one(tmp_path: pathlib.Path) -> None:
    wants = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    tokenizer = make_tokenizer(wants, eos="<|im_end|>")
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": PROMPT}]
    answers = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "Yes"), ("rejected", "No"))}
    _, responses = texts_of(pool_of(read(tmp_path, {"prompt": messages, **answers}), tokenizer), tokenizer)
    assert sorted(responses[0]) == ["No<|im_end|>", "Yes<|im_end|>"]
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: .*no system"):
        pool_of(read(tmp_path, pair()), tokenizer)


# --- Prompts cut inside a word


@pytest.mark.parametrize("word", ["sky sea", "about abroad"])
def test_implicit_prompts_of_strings_need_a_prompt_under_a_chat_template(tmp_path: pathlib.Path, word: str) -> None:
    first, second = word.split()
    row = {"chosen": f"Q: {PROMPT}\nA: the {first}", "rejected": f"Q: {PROMPT}\nA: the {second}"}
    records = read(tmp_path, row)
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: there is no `prompt`"):
        pool_of(records, make_tokenizer(CHATML, eos="<|im_end|>"))
    assert pool_of(records, make_tokenizer(), "plain").num_pairs == 1


@needs_cases
def test_the_case_of_a_prompt_cut_inside_a_word() -> None:
    records = read_records(str(CASES / "implicit_prompt_cut_inside_a_word.jsonl"))
    with pytest.raises(ValueError, match=r"\.jsonl:1: there is no `prompt`.*add `prompt`"):
        pool_of(records, make_tokenizer(CHATML, eos="<|im_end|>"))


# --- Beginnings and ends that are in the text already


def check_markers(records: Any, bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos)
    pool = pool_of(records, tokenizer, "plain")
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for prompt, several in zip(pool.prompt_tokens, pool.response_tokens, strict=True):
        assert prompt[0] == begin and np.sum(prompt == begin) == 1
        assert all(response[-1] == end and np.sum(response == end) == 1 for response in several)
    n = len(records)
    assert f"{n} of {n} prompts begin with '<s>' themselves: it is not added again" in pool.notes
    assert f"{2 * n} of {2 * n} responses end in </s> themselves: it is not added again" in pool.notes


@pytest.mark.parametrize("bos", [False, True])
def test_markers_are_not_doubled(tmp_path: pathlib.Path, bos: bool) -> None:
    row = {"prompt": f"<s>{PROMPT}", "chosen": " It is blue</s>", "rejected": " Not today</s>"}
    check_markers(read(tmp_path, row), bos)
    if (CASES / "markers_in_text.jsonl").exists():
        check_markers(read_records(str(CASES / "markers_in_text.jsonl")), bos)


def test_markers_are_not_doubled_under_a_chat_template(tmp_path: pathlib.Path) -> None:
    tokenizer = make_tokenizer("{{ bos_token }}" + CHATML, eos="<|im_end|>")
    row = {"prompt": f"<s>{PROMPT}", "chosen": "It is blue<|im_end|>", "rejected": "Not today"}
    pool = pool_of(read(tmp_path, row), tokenizer)
    plain = pool_of(read(tmp_path, pair()), tokenizer)
    assert texts_of(pool, tokenizer) == texts_of(plain, tokenizer)
    assert len(pool.notes) == 2 and all("not added again" in note for note in pool.notes)


def test_a_prompt_that_is_rendered_already_is_refused_under_a_chat_template(tmp_path: pathlib.Path) -> None:
    rendered = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: .*a chat template has written it already"):
        pool_of(read(tmp_path, pair(prompt=rendered)), make_tokenizer(CHATML, eos="<|im_end|>"))


def test_an_end_of_turn_that_is_not_flagged_special_is_learnt(tmp_path: pathlib.Path) -> None:
    from transformers import AddedToken

    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>", "<end_of_turn>"))
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=False)])
    _, responses = texts_of(pool_of(read(tmp_path, pair()), tokenizer), tokenizer)
    assert responses[0] == ["It is blue<end_of_turn>", "Not today<end_of_turn>"]


# --- Responses that were cut, labels that are no preference, columns that are not read


@pytest.mark.parametrize("chat", [False, True])
def test_a_response_that_was_cut_gets_no_end(tmp_path: pathlib.Path, chat: bool) -> None:
    tokenizer = make_tokenizer(CHATML if chat else None, eos="<|im_end|>")
    row = {"prompt": PROMPT, "responses": ["It is blue and", "Not today"], "ended": [False, True]}
    _, responses = texts_of(pool_of(read(tmp_path, row), tokenizer), tokenizer)
    assert responses == [["It is blue and", "Not today<|im_end|>"]]
    with pytest.raises(ValueError, match="a list of 2 booleans"):
        read(tmp_path, {**row, "ended": [True]})


@pytest.mark.parametrize("name", ["system", "history", "images"])
def test_columns_that_change_the_meaning_are_refused(tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"pairs\.jsonl:2: there is a column `{name}`"):
        read(tmp_path, pair(**{name: None}), pair(prompt="Hello", **{name: "Be brief"}))


def test_completions_that_people_did_not_like_are_not_learnt(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "kto.jsonl"
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"kto\.jsonl:2: label is false"):
        read_completions(str(file))


# --- Copies, and ids beyond the embedding


def test_copies_are_counted(tmp_path: pathlib.Path) -> None:
    turned = pair(chosen="Not today", rejected="It is blue")
    pool = pool_of(read(tmp_path, pair(), pair(), turned, pair(prompt="Hello")), make_tokenizer(), "plain")
    assert "2 of 4 pairs are there a second time, 1 with the opposite label: each costs a label" in pool.notes


def test_token_ids_beyond_the_embedding_are_named(tmp_path: pathlib.Path) -> None:
    pool = pool_of(read(tmp_path, pair()), make_tokenizer(), "plain")
    largest = max(int(x.max()) for x in [*pool.prompt_tokens, *pool.response_tokens[0]])
    check_tokens(pool, largest + 1, "pairs.jsonl")
    with pytest.raises(ValueError, match=rf"token {largest} of it, but the model's embedding has {largest} rows"):
        check_tokens(pool, largest, "pairs.jsonl")
