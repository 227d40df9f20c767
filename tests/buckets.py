"""A bucket for tests of what downloads: random shards behind a real http server, which counts what is asked of it."""

import contextlib
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHARD_BYTES = 100_000


def content_of(path: str) -> bytes:
    """The bytes of the shard at a path such as `/a/00000.tar`: different for every path."""
    return random.Random(path).randbytes(SHARD_BYTES)


class Bucket:
    """Every path holds a shard but `/missing/..`; `/slow/..` takes two seconds."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self.downloads: Counter[str] = Counter()
        """How often each path was asked for from its beginning."""


@contextmanager
def serve_bucket() -> Iterator[Bucket]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    bucket = _Handler.bucket = Bucket(server.server_address[1])
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        content = content_of(path)
        first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()
        body = content[int(first) : int(last) + 1]
        self.bucket.downloads[path] += first == "0"
        self.send_response(404 if path.startswith("/missing/") else 206)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{len(content)}")
        self.send_header("ETag", f'"{path}"')
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who asked was killed
            for start in range(0, len(body), 1000):
                self.wfile.write(body[start : start + 1000])
                time.sleep(0.02 if path.startswith("/slow/") else 0)

    def log_message(self, format: str, *args: object) -> None:
        pass
