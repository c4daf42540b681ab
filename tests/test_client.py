"""JSON over HTTP against a real server that fails in every way it can."""

import threading
import time
from typing import Any

import pytest

from activedpo_jax.errors import StoreError
from activedpo_jax.oracles import client
from activedpo_jax.oracles.client import Client, Refused, Server, concurrently
from tests.http_server import Answer, HttpServer, Respond

OK = Answer({"well": "done"})
PAGE = Answer(b"<html>502 Bad Gateway</html>")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


def server(url: str, **changes: Any) -> Server:
    return Server(url, "", 4, 10.0, 3)._replace(**changes)


def failing(times: int, bad: Answer) -> Respond:
    """Fails so many times, then is well."""
    return lambda request, number: bad if number < times else OK


FAILURES = {
    "too many requests": Answer(status=429),
    "too many requests, again at once": Answer(status=429, headers={"Retry-After": "0"}),
    "a wait that cannot be read": Answer(status=503, headers={"Retry-After": "soon"}),
    "a defect": Answer(b"Traceback", 500),
    "overloaded": Answer(status=529),
    "slow": Answer({"well": "done"}, seconds=1.3),
    "a byte at a time": Answer(b'{"well": "done"}     ', drips=0.1),
    "broken off before anything": Answer({"well": "done"}, sent=0),
    "broken off within": Answer({"well": "done"}, sent=5),
    "broken off within, length not said": Answer({"well": "done"}, sent=5, length=False),
    "a page": PAGE,
    "a list": Answer([1]),
    "not UTF-8": Answer(b'{"a": "\xff"}'),
}


@pytest.mark.parametrize("bad", FAILURES.values(), ids=FAILURES)
def test_failures_are_tried_again(bad: Answer) -> None:
    with HttpServer(failing(2, bad)) as there:
        timeout = 1.0 if bad.seconds or bad.drips else 10.0
        assert Client(server(there.url, timeout=timeout)).post({"question": "ä"}) == ({"well": "done"}, 3)
        assert there.requests == [{"question": "ä"}] * 3


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (Answer(b"no\nroom", 503), StoreError, r"answers 503 \(no room\), at the last of 2 tries; .*oracle.attempts"),
        (Answer(seconds=0.3), StoreError, "no answer within 0.1 s, at the last of 2 tries; .*oracle.timeout_seconds"),
        (Answer({"a": 1}, sent=3), StoreError, "ProtocolError: .*, at the last of 2 tries"),
        (
            PAGE,
            ValueError,
            "got '<html>502 Bad Gateway</html>', expected JSON, each of 2 times: check config.oracle.u",
        ),
        (Answer(status=429, headers={"Retry-After": "3600"}), StoreError, "it wants to be asked again in 3600 s"),
        (Answer(b"bad key", 401), ValueError, r"answers 401 \(bad key\); expected 200: set config.oracle.api_key_var"),
        (Answer(b"who?", 404), ValueError, r"answers 404 \(who\?\); expected 200: check config.oracle.url and .*model"),
        (Answer(status=302, headers={"Location": "/"}), ValueError, "answers 302 .*: check config.oracle.url"),
        (Answer(b"too long", 400), Refused, "400: too long"),
    ],
)
def test_what_does_not_pass_is_said(bad: Answer, kind: type[Exception], message: str) -> None:
    tries = 2 if kind is StoreError and "3600" not in message or bad is PAGE else 1
    with HttpServer(lambda request, number: bad) as there, pytest.raises(kind, match=message) as raised:
        Client(server(there.url, attempts=2, timeout=0.1)).post({})
    assert len(there.requests) == tries
    if isinstance(raised.value, StoreError):
        assert raised.value.filename == there.url


def test_nobody_there() -> None:
    with HttpServer(failing(0, OK)) as there:
        url = there.url
    with pytest.raises(StoreError, match="NewConnectionError: .*refused, at the last of 2 tries"):
        Client(server(url, attempts=2)).post({})


def test_all_requests_wait_as_long_as_the_server_wants() -> None:
    """One of the two that are sent at first is told to wait; no other follows before."""

    def respond(request: dict[str, Any], number: int) -> Answer:
        return Answer(status=429, headers={"Retry-After": "0.8"}) if number == 0 else OK._replace(seconds=0.3)

    with HttpServer(respond) as there:
        asking = Client(server(there.url, concurrency=2))
        assert len(list(concurrently(lambda n: asking.post({"n": n}), range(4), 2))) == 4
    assert len(there.times) == 5 and there.times[2] - there.times[0] > 0.8


def test_a_time_to_wait_for() -> None:
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
    with HttpServer(failing(1, Answer(status=503, headers={"Retry-After": later}))) as there:
        Client(server(there.url)).post({})
    assert 0.8 < there.times[1] - there.times[0] < 3


def test_pauses_double(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(client, "FIRST_PAUSE", 4.0)
    with HttpServer(failing(6, Answer(status=500))) as there:
        monkeypatch.setattr(client.time, "sleep", lambda seconds: pauses.append(seconds))
        assert Client(server(there.url, attempts=7)).post({}).attempts == 7
    slept = [pause for pause in pauses if pause]
    assert all(high / 2 <= pause <= high for pause, high in zip(slept, (4, 8, 16, 32, 60, 60), strict=True))


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_than_the_limit_at_a_time(limit: int) -> None:
    with HttpServer(lambda request, number: OK._replace(seconds=0.1)) as there:
        asking = Client(server(there.url, concurrency=limit))
        found = list(concurrently(lambda n: asking.post({"n": n}), range(6), limit))
    assert there.most == limit and sorted(n for n, _ in found) == list(range(6))


def test_nothing_is_begun_after_a_failure() -> None:
    """But what was begun before comes, too: it may have cost something."""
    begun: list[int] = []
    four = threading.Event()

    def work(n: int) -> int:
        begun.append(n)
        if n == 3:
            four.wait(10)
            raise ValueError("three")
        if n == 4:
            four.set()
            time.sleep(0.2)
        return n

    found: list[int] = []
    with pytest.raises(ValueError, match="three"):
        for n, _ in concurrently(work, range(100), 2):
            found.append(n)
    assert sorted(begun) == [0, 1, 2, 3, 4] and sorted(found) == [0, 1, 2, 4]


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    with HttpServer(lambda request, number: OK if number == 0 else Answer(b"wrong key sk-123!", 401)) as there:
        asking = Client(server(there.url, key_variable="SOME_KEY"))
        with pytest.raises(ValueError, match="no environment variable 'SOME_KEY'"):
            asking.check_key()
        monkeypatch.setenv("SOME_KEY", "sk-123")
        asking.check_key()
        asking.post({})
        assert there.headers[0]["Authorization"] == "Bearer sk-123" and "sk-123" not in str(there.requests)
        with pytest.raises(ValueError, match=r"answers 401 \(wrong key \*\*\*!\)"):
            asking.post({})
        with pytest.raises(ValueError):
            Client(server(there.url)).post({})
    assert "Authorization" not in there.headers[2]


def test_a_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with HttpServer(lambda request, number: OK) as there:
        monkeypatch.setenv("http_proxy", there.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        Client(server("http://judge.example/v1")).post({})
        assert there.paths == ["http://judge.example/v1"]
        with pytest.raises(StoreError, match="NewConnectionError: .*refused"):
            Client(server("http://127.0.0.1:1/v1", attempts=1)).post({})
