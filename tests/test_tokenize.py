"""From records to token ids: the tokenizer's own ids, cut on the right side, shown in an order that tells nothing."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activedpo_jax.data.encoding import make_encoding
from activedpo_jax.data.preferences import Prompt, Record
from activedpo_jax.data.tokenize import encoded_pool
from tests.tiny_tokenizer import CHATML, make_tokenizer

MANY = 10_000
BOS_CHATML = "{{ '<s>' }}" + CHATML


def make(prompt: Prompt, *responses: str, name: str = "a", **fields: Any) -> Record:
    return dataclasses.replace(Record(name, prompt, responses, None, None, f"data.jsonl:{name}"), **fields)


texts = st.text("the sky\n ?é<", min_size=1, max_size=20).filter(str.strip)
tokenizer = make_tokenizer(CHATML)
CHAT = make_encoding(tokenizer, "chat", MANY, MANY)


@given(texts, st.lists(texts, min_size=2, max_size=3))
@settings(deadline=None, max_examples=50)
def test_chat_ids_are_those_of_the_whole_conversation(prompt: str, responses: list[str]) -> None:
    pool = encoded_pool([make(prompt, *responses)], CHAT, 0)
    apart = sum(int(note.split()[0]) for note in pool.notes if "apart" in note)
    for response, ids in zip(responses, pool.response_tokens[0], strict=True):
        conversation = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        whole = tokenizer.apply_chat_template(conversation, return_dict=False)
        asked = tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True, return_dict=False)
        assert pool.prompt_tokens[0].tolist() == asked
        newline = tokenizer.encode("\n")  # after <|im_end|>, which the model does not write
        assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") and whole[-len(newline) :] == newline
        if whole[: len(asked)] == asked:
            assert [*asked, *ids, *newline] == whole
        else:  # the header's newline and the response's are one token
            apart -= 1
            assert tokenizer.decode(ids) == f"{response}<|im_end|>"
    assert apart == 0


def test_a_token_across_the_border() -> None:
    response = "\n\nblue"
    assert len(tokenizer.encode("\n\n")) == 1  # the tokenizer was trained on it
    pool = encoded_pool([make("sky", response, "blue")], CHAT, 0)
    assert pool.notes == [
        "1 of 2 responses were tokenised apart from their prompts, since a token would have lain across the border"
    ]
    assert pool.prompt_tokens[0].tolist() == tokenizer.encode(
        "<|im_start|>user\nsky<|im_end|>\n<|im_start|>assistant\n"
    )
    assert pool.response_tokens[0][0].tolist() == tokenizer.encode(response + "<|im_end|>")


@pytest.mark.parametrize("bos", [False, True])
def test_plain_ids_are_those_of_the_joint_text(bos: bool) -> None:
    plain = make_tokenizer(bos=bos)
    pool = encoded_pool(
        [make("What colour is the sky?", " It is blue.", " It is")], make_encoding(plain, "auto", MANY, MANY), 0
    )
    for response, ids in zip((" It is blue.", " It is"), pool.response_tokens[0], strict=True):
        whole = plain.encode("What colour is the sky?" + response)
        assert [*pool.prompt_tokens[0], *ids] == [*whole, plain.eos_token_id]
    assert (pool.prompt_tokens[0][0] == plain.bos_token_id) == bos
    assert pool.notes == []


def test_a_response_does_not_begin_a_text_of_its_own() -> None:
    spaced = make_tokenizer(space=True)  # as SentencePiece does, it puts a space before the first word of a text
    pool = encoded_pool([make("the sky\n", "is blue", "is green")], make_encoding(spaced, "plain", MANY, MANY), 0)
    ids = pool.response_tokens[0][0][:-1]
    assert spaced.decode(ids) == "is blue" and spaced.decode(spaced.encode("is blue")) == " is blue"
    assert spaced.decode(pool.prompt_tokens[0]) == " the sky\n"


@given(st.integers(5, 40), st.sampled_from([CHATML, BOS_CHATML]))
@settings(deadline=None, max_examples=40)
def test_a_long_prompt_loses_its_beginning_only(size: int, chat_template: str) -> None:
    chat = make_tokenizer(chat_template)
    records = [make("the sky is blue " * n, "x", "y", name=str(n)) for n in (1, 8)]
    whole = encoded_pool(records, make_encoding(chat, "chat", MANY, MANY), 0)
    cut = encoded_pool(records, make_encoding(chat, "chat", size, MANY), 0)
    bos = int(chat_template is BOS_CHATML)
    header = chat.encode("<|im_start|>assistant\n")
    for before, after in zip(whole.prompt_tokens, cut.prompt_tokens, strict=True):
        assert len(after) == min(size, len(before))
        assert after[bos:].tolist() == before[len(before) - len(after) + bos :].tolist()
        assert after[:bos].tolist() == [chat.bos_token_id] * bos
        assert after[-len(header) :].tolist() == header
    lengths = [len(p) for p in whole.prompt_tokens]
    longer = sum(n > size for n in lengths)
    expected = f"{longer} of 2 prompts ({longer / 2:.1%}) are longer than {size} tokens (up to {max(lengths)})"
    assert [n.startswith(expected) and "lost their beginning" in n for n in cut.notes] == [True] * bool(longer)


def test_a_bucket_that_cannot_hold_the_header() -> None:
    header = len(tokenizer.encode("<|im_start|>assistant\n"))
    with pytest.raises(
        ValueError, match=f"config.data.buckets is {header + 1} tokens; expected more than {header + 1}"
    ):
        encoded_pool([make("sky", "x", "y")], make_encoding(tokenizer, "chat", header + 1, MANY), 0)
    encoded_pool([make("sky", "x", "y")], make_encoding(tokenizer, "chat", header + 2, MANY), 0)


def test_a_long_response_loses_its_end() -> None:
    record = make("sky", "the sky is blue and the grass is green", "blue")
    whole = encoded_pool([record], CHAT, 0)
    cut = encoded_pool([record], make_encoding(tokenizer, "chat", MANY, 3), 0)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert whole.response_tokens[0][0][-1] == end and len(whole.response_tokens[0][0]) > 3
    assert cut.response_tokens[0][0].tolist() == whole.response_tokens[0][0][:3].tolist()
    assert cut.response_tokens[0][1].tolist() == whole.response_tokens[0][1].tolist()
    (note,) = cut.notes
    longest = len(whole.response_tokens[0][0])
    assert note.startswith(f"1 of 2 responses (50.0%) are longer than 3 tokens (up to {longest}) and lost their end")
    assert cut.response_texts[0] == record.responses


def test_responses_that_differ_only_where_they_are_cut() -> None:
    pool = encoded_pool(
        [make("sky", "the sky is blue", "the sky is green")], make_encoding(tokenizer, "chat", MANY, 2), 0
    )
    assert pool.notes[-1].startswith("1 of 1 pairs have two responses of the same tokens")


def test_pairs_of_larger_groups() -> None:
    records = [
        make("p", "x", "y", name="two", preferred=1),
        make("q", "a", "b", "c", name="three", rewards=(1.0, 3.0, 1.0)),
        make([{"role": "user", "content": "r"}], "d", "e", name="none"),
    ]
    pool = encoded_pool(records, CHAT, 0)
    assert list(pool.pair_ids) == ["two", "three/0-1", "three/0-2", "three/1-2", "none"]
    assert pool.pairs[:, 0].tolist() == [0, 1, 1, 1, 2]
    assert np.sort(pool.pairs[:, 1:], axis=1).tolist() == [[0, 1], [0, 1], [0, 2], [1, 2], [0, 1]]
    assert pool.pairs[0, 1 + pool.preferences[0]] == 1  # `preferred`
    assert pool.preferences[1:].tolist() == [-1] * 4
    assert pool.rewards is not None and np.isnan(pool.rewards[[0, 4]]).all()
    for row in (1, 2, 3):
        given_rewards = [(1.0, 3.0, 1.0)[i] for i in pool.pairs[row, 1:]]
        assert pool.rewards[row].tolist() == given_rewards
    assert pool.notes == ["1 of 5 pairs have equal rewards and no preference: a coin decides, by their id"]
    assert pool.prompt_texts[2] == records[2].prompt and pool.responses_per_group == 3
    assert [x.dtype for x in (pool.pairs, pool.preferences, pool.rewards)] == [np.int32, np.int8, np.float32]
    assert encoded_pool(records[:1], CHAT, 0).rewards is None


names = st.lists(st.integers(0, 10**6).map(str), min_size=1, max_size=30, unique=True)


@given(names, st.integers(0, 5), st.randoms())
@settings(deadline=None, max_examples=25)
def test_the_side_depends_on_seed_and_pair_alone(ids: list[str], seed: int, random: Any) -> None:
    def shown(ids: list[str], seed: int) -> dict[str, int]:
        # The label is 1 throughout, so that the preferences are the sides.
        pool = encoded_pool([make("p", "x", "y", name=i, preferred=1) for i in ids], CHAT, seed)
        return dict(zip(pool.pair_ids, pool.preferences.tolist(), strict=True))

    sides = shown(ids, seed)
    some = ids[: len(ids) // 2 + 1]
    random.shuffle(some)
    assert shown(some, seed) == {i: sides[i] for i in some}


@pytest.mark.parametrize("seed", [0, 1])
def test_either_side_is_as_likely_whichever_was_chosen(seed: int) -> None:
    records = [make("p", "x", "y", name=str(i), preferred=i % 2) for i in range(2000)]
    pool = encoded_pool(records, CHAT, seed)
    for chosen in (0, 1):
        assert abs(pool.preferences[chosen::2].mean() - 0.5) < 0.06  # 3.8 standard deviations
    other = encoded_pool(records, CHAT, seed + 2)
    assert abs(np.mean(pool.preferences == other.preferences) - 0.5) < 0.045


def test_errors() -> None:
    with pytest.raises(
        ValueError, match="data.jsonl:b/0-1: the pair id 'b/0-1' is that of a pair of data.jsonl:b already"
    ):
        encoded_pool([make("p", "x", "y", "z", name="b"), make("p", "x", "y", name="b/0-1")], CHAT, 0)
