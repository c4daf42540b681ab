"""Every format of supervised data gives the same completions; what is wrong with a record is said with its place."""

import pathlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activedpo_jax.data.completions import Completion, limit, read_completions
from activedpo_jax.data.draws import split_by_prompt
from activedpo_jax.data.encoding import make_encoding
from activedpo_jax.data.tokenize import encoded_texts
from tests.test_preferences import BLUE, GREEN, SYSTEM, USER, write
from tests.tiny_tokenizer import CHATML, make_tokenizer

MORE = [USER, GREEN, {"role": "user", "content": "Really?"}]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Sky?", "completion": "It is blue."}, "Sky?"),
        ({"prompt": [SYSTEM, USER], "completion": [BLUE]}, [SYSTEM, USER]),
        ({"prompt": [USER], "completion": "It is blue."}, [USER]),
        ({"messages": [USER, BLUE]}, [USER]),
        ({"messages": [SYSTEM, *MORE, BLUE], "prompt": "Sky?"}, [SYSTEM, *MORE]),
        ({"prompt": "Sky?", "chosen": "It is blue.", "rejected": "It is green."}, "Sky?"),
        ({"prompt": [SYSTEM, USER], "chosen": [BLUE], "rejected": [GREEN]}, [SYSTEM, USER]),
        ({"chosen": [SYSTEM, USER, BLUE], "rejected": [SYSTEM, USER, GREEN]}, [SYSTEM, USER]),
        ({"prompt": "Sky?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, [USER]),
        ({"messages": [USER, BLUE], "chosen": [USER, BLUE], "rejected": [USER, GREEN], "prompt": "Sky?"}, [USER]),
        ({"prompt": "Sky?", "completion": "It is blue.", "messages": None, "id": 3}, "Sky?"),
    ],
)
def test_formats(tmp_path: pathlib.Path, row: dict[str, Any], prompt: Any) -> None:
    source = write(tmp_path, row)
    assert read_completions(source) == [Completion(prompt, "It is blue.", f"{source}:1")]


GOOD = {"prompt": "p", "completion": "x"}
ONE_OF = "expected `completion`, `messages`, or `chosen` and `rejected`, and one of these only"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "the line is a list; expected a JSON object"),
        ({}, f"the fields are none; {ONE_OF}"),
        ({"prompt": "p", "responses": ["a", "b"]}, f"the fields are prompt, responses; {ONE_OF}"),
        ({**GOOD, "messages": [USER, BLUE]}, f"the fields are completion, messages, prompt; {ONE_OF}"),
        ({**GOOD, "chosen": "x", "rejected": "y"}, ONE_OF),
        ({"messages": [USER, GREEN], "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, ONE_OF),
        ({"completion": "x"}, "the fields are completion; expected `prompt` among them: add `prompt`"),
        ({**GOOD, "prompt": " \n"}, "the prompt is empty"),
        ({**GOOD, "prompt": [USER, BLUE]}, "the prompt ends in a message of the assistant"),
        ({**GOOD, "completion": " "}, "completion is an empty response; expected some text"),
        ({**GOOD, "completion": 5}, "completion is a number; expected a string"),
        ({**GOOD, "completion": [USER]}, r"completion after the prompt has messages of \['user'\]"),
        ({**GOOD, "completion": [BLUE, USER, BLUE]}, "expected one message, of the assistant"),
        ({"messages": "hello"}, "messages is a string; expected a list of chat messages"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": [{"role": "user"}, BLUE]}, r"messages has the message \{'role': 'user'\}"),
        ({"messages": [USER, BLUE, USER]}, "messages end in one of the user; expected one of the assistant"),
        ({"messages": [BLUE]}, "messages are of assistant; expected one of the user at least"),
        ({"messages": [SYSTEM, BLUE]}, "messages are of system, assistant; expected one of the user at least"),
        ({"messages": [USER, BLUE, BLUE]}, "the prompt ends in a message of the assistant"),
        ({"messages": [USER, {**BLUE, "content": ""}]}, "messages is an empty response"),
        ({"messages": [{**USER, "content": ""}, BLUE]}, "the prompt is empty"),
        ({"prompt": "p", "chosen": "x"}, "add `rejected`"),
        ({"prompt": "p", "chosen": "x", "rejected": "x"}, "chosen and rejected are identical"),
    ],
)
def test_errors_say_where_and_what(tmp_path: pathlib.Path, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.jsonl:3: .*{message}"):
        read_completions(write(tmp_path, GOOD, GOOD, row))


def test_sources_that_cannot_be_read_name_the_options_of_sft(tmp_path: pathlib.Path) -> None:
    for source in (str(tmp_path / "absent.jsonl"), str(tmp_path), ""):
        with pytest.raises(ValueError, match="config.sft.data and config.sft.split$"):
            read_completions(source)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: there is no record in it.*config.sft.data"):
        read_completions(str(tmp_path / "empty.jsonl"))


def test_all_sources_give_the_same_completions(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"messages": [{**USER, "name": "Ann"}, BLUE]}, {"messages": [SYSTEM, *MORE, BLUE]}]
    expected = [(c.prompt, c.completion) for c in read_completions(write(tmp_path, *rows))]
    data = datasets.Dataset.from_list(rows)  # has null names in all messages but the first
    data.to_parquet(str(tmp_path / "data.parquet"))
    datasets.DatasetDict({"train_sft": data}).save_to_disk(str(tmp_path / "saved"))
    for name, split in (("data.parquet", "train"), ("saved", "train_sft")):
        assert [(c.prompt, c.completion) for c in read_completions(str(tmp_path / name), split)] == expected


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 3))
@settings(deadline=None, max_examples=50)
def test_limit(n: int, count: int, seed: int) -> None:
    every = [Completion("p", str(i), "somewhere") for i in range(n)]
    drawn = limit(every, count, seed)
    assert len(drawn) == min(n, count) and drawn == [c for c in every if c in drawn]
    assert all(c in limit(every, count + 3, seed) for c in drawn)


def test_limit_draws_by_seed() -> None:
    every = [Completion("p", str(i), "somewhere") for i in range(30)]
    assert limit(every, 5, 0) != limit(every, 5, 1)


def test_prompts_are_held_out_whole() -> None:
    every = [Completion(prompt, str(i), "somewhere") for i, prompt in enumerate("abcabc")]
    train, heldout = split_by_prompt(every, 0.3, 0)
    assert [len(train), len(heldout)] == [4, 2] and heldout[0].prompt == heldout[1].prompt


def test_token_ids_are_those_of_the_whole_conversation(tmp_path: pathlib.Path) -> None:
    tokenizer = make_tokenizer(CHATML)
    messages = [SYSTEM, *MORE, BLUE]
    completions = read_completions(write(tmp_path, {"messages": messages}))
    texts = encoded_texts(completions, make_encoding(tokenizer, "auto", 999, 999))
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert texts.num_groups == texts.responses_per_group == 1 and not texts.notes
    assert texts.prompt_tokens[0].tolist() == asked
    assert [*asked, *texts.response_tokens[0][0], *tokenizer.encode("\n")] == whole  # the newline is not the model's
    assert texts.response_tokens[0][0][-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_long_texts_are_cut_and_counted(tmp_path: pathlib.Path) -> None:
    plain = make_tokenizer()
    rows = [{"prompt": "the sky is" * 9, "completion": " blue"}, {"prompt": "sky", "completion": " so blue" * 9}]
    completions = read_completions(write(tmp_path, *rows))
    whole = encoded_texts(completions, make_encoding(plain, "plain", 999, 999))
    cut = encoded_texts(completions, make_encoding(plain, "plain", 8, 6))
    assert cut.prompt_tokens[0].tolist() == whole.prompt_tokens[0][-8:].tolist()
    assert cut.response_tokens[1][0].tolist() == whole.response_tokens[1][0][:6].tolist()
    assert whole.response_tokens[1][0][-1] == plain.eos_token_id != cut.response_tokens[1][0][-1]
    assert [note[:15] for note in cut.notes] == ["1 of 2 prompts ", "1 of 2 response"]
    assert cut.response_tokens[0][0].tolist() == whole.response_tokens[0][0].tolist()
