"""A fake object store for tests: the part of Google Cloud Storage's JSON API that gcsfs, TensorStore and Google's own
client use, on localhost, with preconditions on generations, and with failures on demand.

https://docs.cloud.google.com/storage/docs/json_api/v1
"""

import base64
import contextlib
import datetime
import hashlib
import json
import pathlib
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple

from google_crc32c import value as crc32c

from activedpo_jax.remote import RemotePath

BUCKET = "bucket"
_PATH = re.compile(r"/storage/v1/b/([^/]+)(?:/o(?:/([^/]+)(?:/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.+))?)?)?")


class Object(NamedTuple):
    data: bytes
    generation: int
    updated: str


class ObjectServer:
    """A server with one bucket, in threads of this process; a context manager.

    Attributes:
      objects: by name.
      failing: the HTTP status that every request gets; None: the store is well.
      refused: how many requests have got it.
      tick: seconds between two changes whose times differ.
    """

    scheme, tick = "gs", 0.01
    handler: "type[Handler]"

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.failing: int | None = None
        self.refused = 0
        self.lock = threading.RLock()
        self.uploads: dict[str, Any] = {}  # under way
        self._count = 1000
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (self.handler,), {"store": self}))
        self._server.daemon_threads = True

    def __enter__(self) -> "ObjectServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def root(self) -> RemotePath:
        """A work directory."""
        return RemotePath(f"{self.scheme}://{BUCKET}/runs/a")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What the clients have to be told."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "FSSPEC_GCS_TOKEN": "anon",
            "NO_GCE_CHECK": "true",  # for credentials
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask over gRPC what kind of bucket this is
        }

    def put(self, name: str, data: bytes) -> Object:
        with self.lock:
            self._count += 1
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            self.objects[name] = Object(data, self._count, now)
            return self.objects[name]

    def fetch(self, prefix: str, folder: pathlib.Path) -> pathlib.Path:
        """Copies the objects whose names begin so into a folder."""
        with self.lock:
            for name in self.names(prefix):
                path = folder / name.removeprefix(prefix).strip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.objects[name].data)
        return folder

    def names(self, prefix: str) -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))


class Refused(Exception):
    """An answer with an error's HTTP status, and further arguments of `Handler.refuse`."""


class Handler(BaseHTTPRequestHandler):
    """What the stores have in common."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    store: Any

    def handle_request(self, url: urllib.parse.SplitResult, query: dict[str, str], body: bytes) -> None:
        """Answers; raises Refused."""
        raise NotImplementedError

    def refuse(self, status: int, code: str = "") -> None:
        """Answers with an error."""
        raise NotImplementedError

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client is gone, or is killed
            super().handle_one_request()
            return
        self.close_connection = True

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()  # the client waits for it before it sends the body
        return True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        store = self.store
        body = self._body()
        if store.failing is not None:
            store.refused += 1
            return self.refuse(store.failing)
        url = urllib.parse.urlsplit(self.path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query, True).items()}
        try:
            with store.lock:
                self.handle_request(url, query, body)
        except Refused as refused:
            self.refuse(*refused.args)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send_data(self, data: bytes, headers: dict[str, str]) -> None:
        """Sends an object, or the range of it that is asked for."""
        status = 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            if first >= len(data):
                raise Refused(416)
            headers = headers | {"Content-Range": f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"}
            data, status = data[first : last + 1], 206
        self.send(status, data, headers | {"Content-Type": "application/octet-stream"})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class _Handler(Handler):
    def handle_request(self, url: urllib.parse.SplitResult, query: dict[str, str], body: bytes) -> None:
        store, path = self.store, re.sub(r"^/(upload|download)(?=/)", "", url.path)
        match = _PATH.fullmatch(path)
        if match is None:
            raise Refused(400)
        if match[1] != BUCKET or match[3] not in (None, BUCKET):
            raise Refused(404)
        name, target = (urllib.parse.unquote(part) if part else None for part in (match[2], match[4]))
        if target is not None:
            assert name is not None
            copied = store.put(target, self._found(name, query).data)
            return self._json({"done": True, "resource": _metadata(target, copied)})
        if url.path.startswith("/upload"):
            return self._upload(query, body)
        if name is not None:
            return self._object(name, query)
        if path.endswith("/o"):
            return self._json(self._listing(query))
        self._json({"kind": "storage#bucket", "id": BUCKET, "name": BUCKET})

    def _found(self, name: str, query: dict[str, str]) -> Object:
        found: Object | None = self.store.objects.get(name)
        if found is None:
            raise Refused(404)
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != found.generation:
            raise Refused(412)
        if query.get("ifGenerationNotMatch") == str(found.generation):
            raise Refused(304)
        return found

    def _object(self, name: str, query: dict[str, str]) -> None:
        found = self._found(name, query)
        if self.command == "DELETE":
            del self.store.objects[name]
            return self.send(204, b"", {})
        if query.get("alt") != "media":
            return self._json(_metadata(name, found))
        headers = {"x-goog-generation": str(found.generation), "x-goog-hash": f"md5={_md5(found.data)}"}
        self.send_data(found.data, headers)

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        store, name = self.store, query.get("name", "")
        if upload := query.get("upload_id"):
            name, query, before = store.uploads[upload]
            body = before + body
            whole = re.fullmatch(r"bytes .*/(\d+|\*)", self.headers.get("Content-Range", "bytes 0-0/0"))
            assert whole is not None
            if whole[1] == "*":
                store.uploads[upload] = name, query, body
                return self.send(308, b"", {"Range": f"bytes=0-{len(body) - 1}"})
        elif query["uploadType"] == "resumable":
            name = name or json.loads(body)["name"]
            upload = str(len(store.uploads))
            store.uploads[upload] = name, query, b""
            return self.send(200, b"{}", {"Location": f"{store.url}/upload/storage/v1/b/{BUCKET}/o?upload_id={upload}"})
        elif query["uploadType"] == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])
            assert boundary is not None
            parts = body.split(b"--" + boundary[1].encode())[1:-1]
            first, second = (part.split(b"\n\n" if b"\r\n\r\n" not in part else b"\r\n\r\n", 1)[1] for part in parts)
            name = name or json.loads(first)["name"]
            body = second[:-2] if second.endswith(b"\r\n") else second[:-1]
        wanted = query.get("ifGenerationMatch")
        found = store.objects.get(name)
        if wanted is not None and int(wanted) != (found.generation if found else 0):
            raise Refused(412)
        self._json(_metadata(name, store.put(name, body)))

    def _listing(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, folders = [], set[str]()
        for name in self.store.names(prefix):
            rest = name[len(prefix) :]
            if not query.get("startOffset", "") <= name or ("endOffset" in query and name >= query["endOffset"]):
                continue
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
                if not (query.get("includeTrailingDelimiter") and rest.endswith(delimiter)):
                    continue
            items.append(_metadata(name, self.store.objects[name]))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}

    def _json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str = "") -> None:
        if status == 304:
            return self.send(304, b"", {})
        value = {"error": {"code": status, "message": f"the fake store says {status}"}}
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


ObjectServer.handler = _Handler


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


def _metadata(name: str, found: Object) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "bucket": BUCKET,
        "name": name,
        "size": str(len(found.data)),
        "generation": str(found.generation),
        "metageneration": "1",
        "updated": found.updated,
        "timeCreated": found.updated,
        "md5Hash": _md5(found.data),
        "crc32c": base64.b64encode(crc32c(found.data).to_bytes(4, "big")).decode(),
        "contentType": "application/octet-stream",
    }
