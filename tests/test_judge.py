"""A judge behind a real server that answers well, badly and not at all; and whole runs with it, killed and not."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from activedpo_jax import verbs
from activedpo_jax.config import default
from activedpo_jax.errors import StoreError
from activedpo_jax.oracles import client, known
from activedpo_jax.oracles.client import Server
from activedpo_jax.oracles.judge import ORDERS, TEMPLATE, JudgeOracle, JudgeSpec, agreed, check_template, filled_in
from activedpo_jax.oracles.labels import Label, Question
from activedpo_jax.oracles.noise import NO_NOISE, Noise
from tests import test_resume
from tests.http_server import Answer, HttpServer

Judge = Callable[[str, str], str]  # from the texts shown as A and B to A, B or tie


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


def question(name: str, first: str, second: str, prompt: Any = "Which?") -> Question:
    return Question(name, prompt, first, second, 1.0, 1)


QUESTIONS = [question("a", "good", "bad"), question("b", "bad", "good"), question("c", "same", "same")]


def shown(request: dict[str, Any]) -> tuple[str, str]:
    """The responses that a request shows as A and B."""
    (message,) = request["messages"]
    first, second = re.findall(r"<response_.>\n(.*?)\n</response_.>", message["content"], re.DOTALL)
    return first, second


def likes_good(a: str, b: str) -> str:
    good = ("good", known.GOOD)
    return "tie" if (a in good) == (b in good) else "A" if a in good else "B"


def completion(content: Any, **changes: Any) -> Answer:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop", **changes}
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    return Answer({"object": "chat.completion", "choices": [choice], "usage": usage})


def judging(judge: Judge = likes_good) -> Callable[[dict[str, Any], int], Answer]:
    return lambda request, number: completion(json.dumps({"better": judge(*shown(request))}))


def make(url: str, folder: pathlib.Path, noise: Noise = NO_NOISE, **changes: Any) -> JudgeOracle:
    server = Server(f"{url}/chat/completions", "", 3, 5.0, 3)
    return JudgeOracle(JudgeSpec(server, "m")._replace(**changes), folder, noise)


def lines(folder: pathlib.Path) -> list[dict[str, Any]]:
    text = (folder / "rounds" / "001" / "judge.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def said(labels: list[Label]) -> list[str]:
    return [label.preference for label in labels]


def test_a_judge_that_knows_is_believed(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with HttpServer(judging()) as there:
        oracle = make(there.url, tmp_path, prices=(2.0, 10.0))
        oracle.check()
        labels = oracle.ask(QUESTIONS)
    assert [(x.pair_id, x.preference, x.source) for x in labels] == [
        ("a", "first", "judge m"),
        ("b", "second", "judge m"),
        ("c", "tie", "judge m"),
    ]
    assert there.paths == ["/chat/completions"] * 8 and there.most <= 3
    request = there.requests[-1]
    assert request["model"] == "m" and request["temperature"] == 0
    assert request["response_format"]["json_schema"]["schema"]["properties"]["better"]["enum"] == ["A", "B", "tie"]
    assert sorted(map(shown, there.requests[2:])) == sorted(
        [("good", "bad"), ("bad", "good"), ("good", "bad"), ("bad", "good"), ("same", "same"), ("same", "same")]
    )
    cost = (8 * 100 * 2 + 8 * 7 * 10) / 1e6  # with the known pair
    assert oracle.used(1) == {"requests": 8, "prompt_tokens": 800, "completion_tokens": 56, "cost": cost}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("place", ["A", "B"])
def test_a_judge_that_likes_a_place_says_nothing(
    place: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with HttpServer(judging(lambda a, b: place)) as there:
        oracle = make(there.url, tmp_path)
        oracle.check()
        assert "it says tie: expect little of its labels" in capsys.readouterr().out
        assert said(oracle.ask(QUESTIONS)) == ["tie"] * 3
    assert oracle.used(1)["disagreements"] == 3


def test_two_answers_make_one() -> None:
    table = {("first", "first"): "first", ("second", "second"): "second"}
    for one in ("first", "second", "tie"):
        for other in ("first", "second", "tie"):
            assert agreed([one, other]) == table.get((one, other), "tie")


MALFORMED = {
    "no JSON": completion("A"),
    "another key": completion('{"best": "A"}'),
    "another answer": completion('{"better": "C"}'),
    "a number": completion('{"better": 0}'),
    "two": completion('{"better": "A"} {"better": "B"}'),
    "a list": completion('["A"]'),
    "nothing": completion(""),
    "null": completion(None),
    "a refusal": completion(None, message={"content": None, "refusal": "I cannot judge this."}),
    "no choices": Answer({"choices": []}),
    "another schema": Answer({"error": {"message": "no"}}),
    "choices of another kind": Answer({"choices": ["A"]}),
}


@pytest.mark.parametrize("bad", MALFORMED.values(), ids=MALFORMED)
def test_malformed_answers_are_asked_for_again(
    bad: Answer, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each question's first answer is malformed; then it answers, to the question with a reminder."""
    asked = set[tuple[str, str]]()

    def respond(request: dict[str, Any], number: int) -> Answer:
        first = shown(request) not in asked
        asked.add(shown(request))
        assert first or "Your answer has to be" in request["messages"][0]["content"]
        return bad if first else judging()(request, number)

    with HttpServer(respond) as there:
        oracle = make(there.url, tmp_path)
        assert said(oracle.ask(QUESTIONS[:1])) == ["first"]
    assert len(there.requests) == 4 and oracle.used(1)["malformed"] == 2
    assert [bool(line["problem"]) for line in lines(tmp_path)] == [True, True, False, False]


def bad_of(marker: str, bad: Answer) -> Callable[[dict[str, Any], int], Answer]:
    """Answers badly where a response is `marker`."""
    return lambda request, number: bad if marker in shown(request) else judging()(request, number)


@pytest.mark.parametrize(
    ("bad", "requests", "why"),
    [
        (completion("I like both"), 3, "answers 'I like both'"),
        (completion('{"better": "A"', finish_reason="length"), 1, "stops at its limit of tokens .*max_tokens.*"),
        (completion("", finish_reason="content_filter"), 1, "is stopped by the server's content filter"),
        (Answer(b"too long: 9000 tokens", 400), 2, r"is refused by the server \(400: too long: 9000 tokens\)"),
    ],
)
def test_pairs_without_an_answer_are_skipped_if_they_are_few(
    bad: Answer, requests: int, why: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [*QUESTIONS, question("d", "odd", "bad")]
    with HttpServer(bad_of("odd", bad)) as there:
        assert said(make(there.url, tmp_path, max_failed=0.25).ask(few)) == ["first", "second", "tie", "skip"]
        line = capsys.readouterr().out
        assert re.search(f"judge m: round 1: 1 of 4 pairs have no answer; of pair 'd' it {why}: skipped", line)
        assert len([r for r in there.requests if "odd" in shown(r)]) == 2 * requests
        with pytest.raises(ValueError, match=rf"1 of 4 .* it {why}; expected at most config.oracle.max_failed=0.2 of"):
            make(there.url, tmp_path, max_failed=0.2).ask(few)
    # Once the judge is well, the same command asks about that pair alone.
    with HttpServer(judging()) as there:
        assert said(make(there.url, tmp_path).ask(few))[3] == "tie"
    assert len(there.requests) == 2


@pytest.mark.parametrize(
    "content",
    [
        '  {"better": "A", "reason": "it is good"}\n',
        '```json\n{"better": "A"}\n```',
        '<think>B? {"better": "B"}</think>\n\n{"better": "A"}',
        'B it is... no.</think>{"better": "A"}',
    ],
)
def test_answers_of_servers_without_schemas(
    content: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They refuse the first request, and are not asked for a schema again."""

    def respond(request: dict[str, Any], number: int) -> Answer:
        if "response_format" in request:
            return Answer({"error": "response_format is not supported"}, 400)
        good_is_a = likes_good(*shown(request)) == "A"
        return completion(content if good_is_a else '{"better": "B"}')

    with HttpServer(respond) as there:
        oracle = make(there.url, tmp_path)
        oracle.check()
        assert said(oracle.ask(QUESTIONS[:2])) == ["first", "second"]
    assert "does not hold answers to a JSON schema" in capsys.readouterr().out
    assert ["response_format" in request for request in there.requests] == [True] + 6 * [False]
    assert oracle.used(1)["requests"] == 7


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (Answer(b"no such model", 404), ValueError, "answers 404 .*config.oracle.model"),
        (Answer(status=401), ValueError, "answers 401 .*config.oracle.api_key_variable"),
        (Answer(b"bad request", 400), ValueError, r"asked about a known pair, it is refused by the server \(400: bad"),
        (completion("hm"), ValueError, "asked about a known pair, it answers 'hm'; expected one of A, B, tie in JSON"),
        (Answer(status=503), StoreError, "answers 503"),
    ],
)
def test_judges_that_do_not_work_are_found_before_a_round(
    bad: Answer, kind: type[Exception], message: str, tmp_path: pathlib.Path
) -> None:
    with HttpServer(lambda request, number: bad) as there, pytest.raises(kind, match=message):
        make(there.url, tmp_path).check()
    assert not list(tmp_path.iterdir())


def test_what_was_answered_is_not_paid_for_again(tmp_path: pathlib.Path) -> None:
    """The server fails for good after five answers; what came is on record, and another prompt is another question."""
    respond = lambda r, n: judging()(r, n) if n < 5 else Answer(status=500)  # noqa: E731
    with HttpServer(respond) as there, pytest.raises(StoreError, match="answers 500"):
        make(there.url, tmp_path).ask(QUESTIONS)
    assert len(lines(tmp_path)) == 5
    path = tmp_path / "rounds" / "001" / "judge.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # the fifth was cut short
    with HttpServer(judging()) as there:
        assert said(make(there.url, tmp_path).ask(QUESTIONS)) == ["first", "second", "tie"]
        assert len(there.requests) == 2
        assert said(make(there.url, tmp_path).ask(QUESTIONS)) == ["first", "second", "tie"]
        assert len(there.requests) == 2
        make(there.url, tmp_path, template=TEMPLATE + "!").ask(QUESTIONS)
        assert len(there.requests) == 8
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"judge.jsonl:1: not an answer"):
        make(there.url, tmp_path).ask(QUESTIONS)


def test_servers_that_do_not_count_tokens(tmp_path: pathlib.Path) -> None:
    def respond(request: dict[str, Any], number: int) -> Answer:
        answer = judging()(request, number)
        del answer.body["usage"]
        return answer

    with HttpServer(respond) as there:
        oracle = make(there.url, tmp_path)
        oracle.ask(QUESTIONS[:1])
    assert oracle.used(1) == {"requests": 2, "prompt_tokens": 0, "completion_tokens": 0, "uncounted": 2}


def test_fields_of_the_request(tmp_path: pathlib.Path) -> None:
    fields = {"temperature": None, "max_tokens": None, "max_completion_tokens": 50, "response_format": None}
    with HttpServer(judging()) as there:
        oracle = make(there.url, tmp_path, request=fields)
        oracle.check()
    assert [sorted(request) for request in there.requests] == [["max_completion_tokens", "messages", "model"]] * 2


def test_noise_on_top(tmp_path: pathlib.Path) -> None:
    with HttpServer(judging()) as there:
        labels = make(there.url, tmp_path, Noise("flip", 1.0)).ask(QUESTIONS)
    assert said(labels) == ["second", "first", "tie"]
    assert {line["better"] for line in lines(tmp_path) if line["pair_id"] == "a"} == {"first"}  # as the judge said it


def test_a_prompt_of_ones_own() -> None:
    template = "{second} {first} {prompt} {other}"
    braces = question("a", "1 {second}", "2 \\g<0> {}", "p {first}")
    assert filled_in(template, braces, ORDERS[0]) == "2 \\g<0> {} 1 {second} p {first} {other}"
    assert filled_in(template, braces, ORDERS[1]) == "1 {second} 2 \\g<0> {} p {first} {other}"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert "[system]\nBe brief.\n\n[user]\nHi" in filled_in(TEMPLATE, question("a", "x", "y", chat), ORDERS[0])
    assert filled_in("{prompt}", question("a", "x", "y", chat[1:]), ORDERS[0]) == "Hi"
    tools = [*chat, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert '[assistant]\ntool_calls: [{"name": "f"}]' in filled_in("{prompt}", question("a", "", "", tools), ORDERS[0])
    check_template(TEMPLATE)
    with pytest.raises(ValueError, match=r"config.oracle.template: the file has no {first} and no {second}; expected"):
        check_template("{prompt} first second")


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("template", "{prompt}", "the file has no {first} and no {second}"),
        ("template", b"\xff", "expected a text file"),
        ("template", None, "No such file or directory.*; expected a text file"),
        ("request", "{", "got '{', expected a JSON object"),
        ("request", "[]", r"got '\[\]', expected a JSON object"),
    ],
)
def test_what_cannot_be_asked_is_found_first(
    option: str, content: str | bytes | None, message: str, tmp_path: pathlib.Path
) -> None:
    config = default()
    config.oracle.kind = "judge"
    path = tmp_path / "prompt.txt"
    if option == "template":
        config.oracle.template = str(path)
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    else:
        config.oracle.request = content
    with pytest.raises(ValueError, match=f"config.oracle.{option}: .*{message}"):
        verbs.oracle_inputs(config)


def test_another_prompt_is_another_input(tmp_path: pathlib.Path) -> None:
    config = default()
    config.oracle.kind = "judge"
    own = verbs.oracle_inputs(config)
    config.oracle.template = str(tmp_path / "prompt.txt")
    (tmp_path / "prompt.txt").write_text(TEMPLATE)
    assert verbs.oracle_inputs(config) == own
    (tmp_path / "prompt.txt").write_text(TEMPLATE + "Be kind.")
    assert verbs.oracle_inputs(config) != own


# Real processes, really ended

SCRIPT = """
import pathlib, sys
from activedpo_jax import errors
from tests.test_judge import QUESTIONS, make

errors.end_at_signals()
with errors.clean_errors(), errors.signals_wait():
    make(sys.argv[1], pathlib.Path(sys.argv[2])).ask(QUESTIONS)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_ended_loses_what_was_in_flight_alone(ending: signal.Signals, tmp_path: pathlib.Path) -> None:
    """It ends once three answers of six are on record; up to three requests are under way at a time."""
    path = tmp_path / "rounds" / "001" / "judge.jsonl"
    with HttpServer(lambda r, n: judging()(r, n)._replace(seconds=0 if n < 3 else 3.0)) as there:
        command = [sys.executable, "-c", SCRIPT, there.url, str(tmp_path)]
        root = pathlib.Path(__file__).parents[1]
        process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
        while (len(lines(tmp_path)) if path.exists() else 0) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(ending)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == (-signal.SIGKILL if ending == signal.SIGKILL else 75), errors
    done = len(lines(tmp_path))
    assert 3 <= done < 6 and len(there.requests) <= done + 3
    with HttpServer(judging()) as there:
        assert said(make(there.url, tmp_path).ask(QUESTIONS)) == ["first", "second", "tie"]
    assert len(there.requests) == 6 - done


RUN = {
    "strategies": "activedpo",
    "seeds": "0",
    "rounds": "1",
    "labels_per_round": "6",
    "synthetic.pool_pairs": "48",
    "synthetic.heldout_pairs": "24",
    "scratch.steps": "5",
    "features.dim": "64",
    "dpo.epochs": "2",
    "oracle.kind": "judge",
    "oracle.model": "m",
    "oracle.api_key_variable": "JUDGE_KEY",
    "oracle.concurrency": "2",
    "oracle.prompt_price": "2",
}


def longer(a: str, b: str) -> str:
    return "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"


def check_labels(folder: pathlib.Path) -> None:
    """What is learnt from is what the judge says, and is on record once."""
    selected = [json.loads(line) for line in (folder / "rounds/001/selected.jsonl").read_text().splitlines()]
    assert len(selected) == 6
    for row in selected:
        assert row["preference"] == {"A": "first", "B": "second", "tie": "tie"}[longer(row["first"], row["second"])]
    labels = [json.loads(line)["pair_id"] for line in (folder / "rounds/001/labels.jsonl").read_text().splitlines()]
    assert sorted(labels) == sorted(row["pair_id"] for row in selected)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_pays_for_what_was_in_flight_alone(
    ending: signal.Signals, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is killed once five answers are on record, of twelve; it has two requests under way at a time."""
    monkeypatch.setenv("JUDGE_KEY", "sk-0123456789")
    folder, path = tmp_path / "run", tmp_path / "run" / "rounds" / "001" / "judge.jsonl"

    def answered() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    with HttpServer(lambda r, n: judging(longer)(r, n)._replace(seconds=0.4 if n > 1 else 0)) as there:
        options = {**RUN, "oracle.url": there.url}
        process = test_resume.start(folder, "staged", **options)
        while answered() < 7 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(ending)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == (-signal.SIGKILL if ending == signal.SIGKILL else 75), output
        assert not (folder / "rounds/001/labels.jsonl").exists()
        before, done = len(there.requests), answered()
        assert 7 <= done < 14 and before <= done + 2
        test_resume.finish(test_resume.start(folder, "staged", **options))
        again = [tuple(map(str, shown(request))) for request in there.requests[before + 2 :]]  # after the known pair
        assert len(again) == 14 - done
    check_labels(folder)
    assert json.loads((folder / "summary.json").read_text())["rounds"][1]["oracle"]["prompt_tokens"] == 1600
