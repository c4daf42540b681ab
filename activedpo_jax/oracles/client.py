"""JSON over HTTP, for oracles behind a server: limits, time-outs, retries, and errors that say what to change.

A request is sent again, after a pause, if the server fails (408, 425, 429, 5xx), takes too long, breaks off, or
answers something else than JSON.  The pause doubles from one try to the next, with jitter; where the server says how
long (`Retry-After`), it is that long, for all requests of the client.  The API key is read from the environment, and is
in no file and no message.
"""

import email.utils
import json
import os
import queue
import random
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import urllib3

from activedpo_jax import errors

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two tries
LONGEST_WAIT = 600.0  # seconds for which a server may ask to be left alone; if it is longer, the command ends

_CHANGE = "set config.oracle.attempts or config.oracle.timeout_seconds higher, or config.oracle.concurrency lower"


class Server(NamedTuple):
    """Who is asked, and how often."""

    url: str
    key_variable: str  # the environment variable that has the API key; empty: none is sent
    concurrency: int  # requests at a time
    timeout: float  # seconds that a request may take, with its answer
    attempts: int  # times that a request is sent at most


class Reply(NamedTuple):
    content: dict[str, Any]
    attempts: int  # times that the request was sent


class Refused(Exception):
    """The server does not accept this one request (400, 413, 422); others may be accepted."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"{status}: {said}")
        self.status, self.said = status, said


class _Failed(Exception):
    """A try that another may follow."""

    def __init__(self, reason: str, wait: float | None = None, lasting: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds for which the server wants to be left alone
        self.lasting = lasting  # that it fails in the same way each time is a mistake of ours


class Client:
    """Sends requests to one URL, from any thread."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._pool = _pool(server)
        self._open_at = 0.0  # of the monotonic clock: when the server wants to be asked again

    def check_key(self) -> None:
        """Raises ValueError if the API key is not in the environment."""
        name = self.server.key_variable
        if name and not os.environ.get(name):
            raise ValueError(
                f"config.oracle.api_key_variable: there is no environment variable {name!r}; expected the API key of "
                f"{self.server.url} in it: export {name}=..., or name another"
            )

    def post(self, body: Mapping[str, Any]) -> Reply:
        """Sends a request until it is answered.

        Raises:
          Refused: the server does not accept it.
          ValueError: it accepts none: no such URL, no permission, no JSON; says which option to change.
          StoreError: it cannot be reached, or fails, at each try; the same command may succeed later.
        """
        data, url = json.dumps(body, ensure_ascii=False).encode(), self.server.url
        for attempt in range(1, self.server.attempts + 1):
            time.sleep(max(0.0, self._open_at - time.monotonic()))
            try:
                return Reply(self._try(data), attempt)
            except _Failed as failed:
                if failed.wait is not None and failed.wait > LONGEST_WAIT:
                    reason = f"{failed}; it wants to be asked again in {failed.wait:.0f} s"
                    raise errors.StoreError.passing(url, reason) from failed
                if attempt == self.server.attempts:
                    if failed.lasting:
                        wrong = f"{url}: {failed}, each of {attempt} times: check config.oracle.url"
                        raise ValueError(wrong) from failed
                    reason = f"{failed}, at the last of {attempt} tries; if it does so again, {_CHANGE}"
                    raise errors.StoreError.passing(url, reason) from failed
                if failed.wait is not None:
                    self._open_at = max(self._open_at, time.monotonic() + failed.wait)
                else:
                    time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0))
        raise AssertionError("there is one attempt at least")

    def _try(self, data: bytes) -> dict[str, Any]:
        timeout = self.server.timeout
        deadline, headers = time.monotonic() + timeout, {"Content-Type": "application/json"}
        if self.server.key_variable:
            headers["Authorization"] = f"Bearer {os.environ.get(self.server.key_variable, '')}"
        try:
            # Without the library's own retries, which know no deadline, and redirects, which would drop the body.
            response = self._pool.request(
                "POST",
                self.server.url,
                body=data,
                headers=headers,
                timeout=urllib3.Timeout(total=timeout),
                retries=False,
                redirect=False,
                preload_content=False,
            )
            said = self._read(response, deadline)
        except urllib3.exceptions.SSLError as error:
            raise ValueError(f"{self.server.url}: {self._line(str(error))}; expected a valid certificate") from error
        except urllib3.exceptions.HTTPError as error:
            late = isinstance(error, urllib3.exceptions.TimeoutError)
            if late and not isinstance(error, urllib3.exceptions.NewConnectionError):  # which the library counts in
                raise _Failed(f"no answer within {timeout:g} s") from error
            raise _Failed(f"{type(error).__name__}: {self._line(str(error))}") from error
        return self._judged(response, said)

    def _read(self, response: urllib3.BaseHTTPResponse, deadline: float) -> bytes:
        """The answer's body.  The library's time-out is for each piece of it, and a server may send them for ever."""
        said = bytearray()
        try:
            while piece := response.read1(2**16):
                said += piece
                if time.monotonic() > deadline:
                    raise _Failed(f"no whole answer within {self.server.timeout:g} s")
        except BaseException:
            response.close()
            raise
        response.release_conn()
        return bytes(said)

    def _judged(self, response: urllib3.BaseHTTPResponse, said: bytes) -> dict[str, Any]:
        """The answer, if it is one."""
        status, text = response.status, self._line(said.decode(errors="replace"))
        if 200 <= status < 300:
            try:
                found = json.loads(said)
            except ValueError as error:
                raise _Failed(f"got {text!r}, expected JSON", lasting=True) from error
            if not isinstance(found, dict):
                raise _Failed(f"got {text!r}, expected a JSON object", lasting=True)
            return found
        if status in (400, 413, 422):
            raise Refused(status, text)
        if status in (408, 425, 429) or status >= 500:
            raise _Failed(f"answers {status} ({text})", _wait(response))
        change = {
            401: "set config.oracle.api_key_variable to the environment variable that has the API key",
            403: "set config.oracle.api_key_variable to the environment variable that has the API key",
            404: "check config.oracle.url and config.oracle.model",
        }.get(status, "check config.oracle.url")
        raise ValueError(f"{self.server.url}: answers {status} ({text}); expected 200: {change}")

    def _line(self, text: str) -> str:
        """The beginning of what a server says, without the API key, which some of them repeat."""
        key = os.environ.get(self.server.key_variable, "") if self.server.key_variable else ""
        return " ".join((text.replace(key, "***") if key else text).split())[:300]


def _pool(server: Server) -> urllib3.PoolManager:
    """The connections, through the proxy that the environment names, if it names one."""
    url = urllib.parse.urlsplit(server.url)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        return urllib3.ProxyManager(proxy, maxsize=server.concurrency)
    return urllib3.PoolManager(maxsize=server.concurrency)


def _wait(response: urllib3.BaseHTTPResponse) -> float | None:
    """The seconds, or the time, of a `Retry-After` (RFC 9110, section 10.2.3); None: there is none that can be read."""
    header = response.headers.get("Retry-After")
    if header is None:
        return None
    try:
        return max(0.0, float(header))  # with OpenAI's fractions of a second, which the RFC does not know
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def concurrently(
    function: Callable[[_Item], _Result], items: Sequence[_Item], limit: int
) -> Iterator[tuple[_Item, _Result]]:
    """Each item with its result, as they come; at most `limit` of them are worked on at a time.

    Once one has failed, or the caller has lost interest, no other is begun.  A signal ends the process between two
    results: those that have come were given to the caller.

    Raises:
      Exception: the first that the function raises, after the results of all items that were begun.
    """
    todo: queue.SimpleQueue[_Item] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[_Item, _Result] | Exception | None] = queue.SimpleQueue()  # None: a thread has ended
    over = threading.Event()
    for item in items:
        todo.put(item)

    def work() -> None:
        while not over.is_set():
            try:
                item = todo.get_nowait()
            except queue.Empty:
                break
            try:
                done.put((item, function(item)))
            except Exception as error:
                over.set()
                done.put(error)
        done.put(None)

    threads, failed = min(limit, len(items)), None
    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()  # a process that ends does not wait for their requests
    try:
        while threads:
            result = _next(done)
            if result is None:
                threads -= 1
            elif isinstance(result, Exception):
                failed = failed or result
            else:
                yield result
    finally:
        over.set()
    if failed is not None:
        raise failed


def _next(done: "queue.SimpleQueue[Any]") -> Any:
    while True:
        try:
            return done.get(timeout=0.1)
        except queue.Empty:
            if errors.signalled():
                errors.end()
