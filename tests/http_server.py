"""A server for tests, on localhost, that answers POST requests as it is told, well or badly."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """What the server does with a request."""

    body: Any = b""  # bytes, or what is sent as JSON
    status: int = 200
    headers: Mapping[str, str] = {}
    seconds: float = 0.0  # before it answers
    sent: int | None = None  # bytes of the body after which it breaks off; None: all are sent
    drips: float = 0.0  # seconds between two bytes
    length: bool = True  # whether it says how long the body is


Respond = Callable[[dict[str, Any], int], Answer]


class HttpServer:
    """A context manager.

    Args:
      respond: what is answered to a request's JSON; the second argument is the request's number, from 0.

    Attributes:
      requests: the JSON of all that came.
      headers: theirs.
      paths: theirs.
      times: when they came, of the monotonic clock.
      most: that were worked on at the same time.
    """

    def __init__(self, respond: Respond) -> None:
        self.respond = respond
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.most = self._now = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"owner": self}))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, path: str, headers: dict[str, str], request: dict[str, Any]) -> Answer:
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.headers.append(headers)
            self.paths.append(path)
            self.times.append(time.monotonic())
            self._now += 1
            self.most = max(self.most, self._now)
        answer = self.respond(request, number)
        time.sleep(answer.seconds)
        with self._lock:
            self._now -= 1
        return answer

    def __enter__(self) -> "HttpServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: HttpServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = self.owner.answer(self.path, dict(self.headers), request)
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        try:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if answer.length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if answer.drips:
                for i in range(len(body)):
                    self.wfile.write(body[i : i + 1])
                    time.sleep(answer.drips)
            else:
                self.wfile.write(body[: answer.sent])
        except ConnectionError:
            pass  # the client has lost patience
        self.close_connection = answer.sent is not None or not answer.length

    def log_message(self, *args: Any) -> None:
        pass
