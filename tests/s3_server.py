"""A fake S3 for tests: what s3fs uses of it, with `If-None-Match`; signatures are not looked at.

https://docs.aws.amazon.com/AmazonS3/latest/API/API_Operations_Amazon_Simple_Storage_Service.html
"""

import email.utils
import hashlib
import urllib.parse
from datetime import datetime
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from tests.object_server import BUCKET, Handler, Object, ObjectServer, Refused

_CODES = {403: "AccessDenied", 404: "NoSuchKey", 412: "PreconditionFailed", 429: "SlowDown", 503: "ServiceUnavailable"}
_PAGE = 5  # names in a listing, of 1000 there: so that tests meet the next page


class _Handler(Handler):
    def handle_request(self, url: urllib.parse.SplitResult, query: dict[str, str], body: bytes) -> None:
        bucket, _, name = urllib.parse.unquote(url.path).lstrip("/").partition("/")
        if bucket != BUCKET:
            raise Refused(404, "NoSuchBucket")
        if name:
            return self._upload(name, query, body) if {"uploads", "uploadId"} & set(query) else self._object(name, body)
        if "delete" in query:
            return self._delete(body)
        if query.get("list-type") == "2":
            return self._xml("ListBucketResult", self._listing(query))
        raise Refused(400, "InvalidRequest")

    def _object(self, name: str, body: bytes) -> None:
        if self.command == "PUT":
            return self.send(200, b"", {"ETag": _etag(self._written(name, body))})
        if self.command == "DELETE":
            self.store.objects.pop(name, None)
            return self.send(204, b"", {})
        found = self.store.objects.get(name)
        if found is None:
            raise Refused(404)
        when = email.utils.format_datetime(datetime.fromisoformat(found.updated), usegmt=False)
        self.send_data(found.data, {"ETag": _etag(found), "Last-Modified": when.replace("+0000", "GMT")})

    def _written(self, name: str, data: bytes) -> Object:
        if self.store.failing_after is not None:
            self.store.failing_after -= 1
            if self.store.failing_after < 0:
                raise Refused(403)
        if self.headers.get("If-None-Match") == "*" and name in self.store.objects:
            raise Refused(412)
        return self.store.put(name, data)

    def _upload(self, name: str, query: dict[str, str], body: bytes) -> None:
        """In parts; the object appears with the last request."""
        store = self.store
        if "uploads" in query:
            upload = str(len(store.uploads))
            store.uploads[upload] = {}
            return self._xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
        parts = store.uploads[query["uploadId"]]
        if self.command == "PUT":
            parts[int(query["partNumber"])] = body
            return self.send(200, b"", {"ETag": '"part"'})
        if self.command == "DELETE":
            return self.send(204, b"", {})
        whole = self._written(name, b"".join(parts[number] for number in sorted(parts)))
        self._xml("CompleteMultipartUploadResult", f"<ETag>{escape(_etag(whole))}</ETag>")

    def _delete(self, body: bytes) -> None:
        names = [element.text for element in ElementTree.fromstring(body).iter() if element.tag.endswith("Key")]
        if self.store.undeletable:
            errors = "".join(
                f"<Error><Key>{escape(str(name))}</Key><Code>AccessDenied</Code></Error>" for name in names
            )
            return self._xml("DeleteResult", errors)
        for name in names:
            self.store.objects.pop(str(name), None)
        self._xml("DeleteResult", "")

    def _listing(self, query: dict[str, str]) -> str:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        entries: dict[str, str] = {}
        for name in self.store.names(prefix):
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folder = prefix + rest.split(delimiter)[0] + delimiter
                entries[folder] = f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
            else:
                found = self.store.objects[name]
                entries[name] = (
                    f"<Contents><Key>{escape(name)}</Key><Size>{len(found.data)}</Size>"
                    f"<LastModified>{found.updated}</LastModified><ETag>{escape(_etag(found))}</ETag></Contents>"
                )
        left = sorted(name for name in entries if name > query.get("continuation-token", ""))
        page = left[: min(_PAGE, int(query.get("max-keys", _PAGE)))]
        truncated = len(page) < len(left)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if truncated else ""
        return (
            "".join(entries[name] for name in page)
            + f"<KeyCount>{len(page)}</KeyCount><IsTruncated>{str(truncated).lower()}</IsTruncated>{token}"
        )

    def _xml(self, tag: str, content: str) -> None:
        self.send(200, f"<{tag}>{content}</{tag}>".encode(), {"Content-Type": "application/xml"})

    def refuse(self, status: int, code: str = "") -> None:
        condition = "<Condition>If-None-Match</Condition>" if status == 412 else ""
        code = code or _CODES.get(status, "InternalError")
        text = f"<Error><Code>{code}</Code><Message>the fake store says {status}</Message>{condition}</Error>"
        self.send(status, text.encode(), {"Content-Type": "application/xml"})


class S3Server(ObjectServer):
    """A server with one bucket.

    Attributes:
      failing_after: how many more objects may be written; None: any number.
      undeletable: who asks may write and read, but not delete.
    """

    scheme, tick, handler = "s3", 1.0, _Handler

    def __init__(self) -> None:
        super().__init__()
        self.failing_after: int | None = None
        self.undeletable = False

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",  # no chunks with checksums of their own
        }


def _etag(found: Object) -> str:
    return f'"{hashlib.md5(found.data).hexdigest()}"'
