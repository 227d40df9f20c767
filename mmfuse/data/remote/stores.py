"""Where remote shards are kept: http(s) through aiohttp, s3 through s3fs, gs through gcsfs; one request each.

The functions run on fsspec's event loop. The libraries' own retries and timeouts are turned off; ours are in
`mmfuse.data.remote.retry`. Their errors hold URLs, so only our own words leave this file.
"""

import re
import string
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import aiohttp
import fsspec

from mmfuse.data.remote.retry import RemoteError, status_error
from mmfuse.errors import ConfigError

READ_BYTES = 4 << 20
_NO_LISTING = "patterns and folders need a directory listing; write the names out, as in train-{000..127}.tar"
_BAD_CERTIFICATE = "the server's certificate is not trusted, or it does not speak https"
_NO_CREDENTIALS = "no usable credentials were found in the environment or in the provider's files"


class Entry(NamedTuple):
    """What a folder holds."""

    url: str
    is_folder: bool


class Answer(NamedTuple):
    """Headers that have come, and the body that comes."""

    headers: Mapping[str, str]
    """Names in lower case."""
    read: Callable[[int], Awaitable[bytes]]
    """So many bytes or fewer; nothing at the end."""
    close: Callable[[], None]


class Store(NamedTuple):
    """How one kind of server is asked."""

    open: Callable[[str, int, int], Awaitable[Answer]]
    """The bytes of a URL from one offset to another; a server may send fewer, or the whole file."""
    list: Callable[[str], Awaitable[list[Entry]]]
    """What lies directly in a folder; of a file, the file."""
    explain: Callable[[Exception], RemoteError | None]
    """What the library's error says, without its URL; None: not one of its own."""


def find_store(url: str, *, timeout_seconds: float) -> Store:
    """The store of a URL.

    Raises:
        ConfigError: it needs an extra that is not installed.
    """
    scheme = url.partition("://")[0].lower()
    try:
        if scheme == "s3":
            return _s3_store(timeout_seconds)
        return _gs_store() if scheme == "gs" else _http_store()
    except ImportError as error:
        extra = {"s3": "s3", "gs": "gcs"}[scheme]
        raise ConfigError(f"{scheme}:// needs packages of an extra: pip install 'mmfuse[{extra}]'") from error


def _http_store() -> Store:
    client = {
        "timeout": aiohttp.ClientTimeout(total=None),
        "trust_env": True,
        "headers": {"Accept-Encoding": "identity"},
        "auto_decompress": False,
        "requote_redirect_url": False,  # it would break signatures
        "read_bufsize": 1 << 20,
    }
    files = fsspec.filesystem("http", encoded=True, client_kwargs=client)
    return Store(
        open=lambda url, start, end: _open_http(files, url, start, end),
        list=lambda url: _list_http(files, url),
        explain=explain_http,
    )


async def _open_http(files: Any, url: str, start: int, end: int) -> Answer:
    session = await files.set_session()
    response = await session.get(files.encode_url(_exact(url)), headers={"Range": f"bytes={start}-{end - 1}"})
    headers = {name.lower(): value for name, value in response.headers.items()}
    answer = Answer(headers, response.content.read, response.close)
    if response.status not in (200, 206):
        response.close()
        raise status_error(response.status, retry_after=headers.get("retry-after", ""))
    if headers.get("content-encoding", "identity") != "identity":
        response.close()
        raise RemoteError("the server compresses the file; serve it as it is", passing=False)
    return answer


async def _list_http(files: Any, url: str) -> list[Entry]:
    url = _exact(url)
    try:
        names = await files._ls(url, detail=False)
    except (FileNotFoundError, aiohttp.ClientResponseError) as error:
        problem = explain_http(error)
        assert problem is not None
    else:
        inside = (name.removeprefix(url) for name in names if name.startswith(url))
        entries = [Entry(url + name, name.endswith("/")) for name in inside if re.fullmatch(r"[^/?#]+/?", name)]
        if entries:
            return entries
        problem = RemoteError("the server shows no listing", passing=False)
    raise problem if problem.passing else RemoteError(f"{problem.reason}; {_NO_LISTING}", passing=False)


def _exact(url: str) -> str:
    """The URL with nothing quoted that is quoted already: that would break signatures."""
    return quote(url, safe=string.punctuation)


def explain_http(error: Exception) -> RemoteError | None:
    match error:
        case aiohttp.ClientResponseError():
            headers = error.headers or {}
            return status_error(error.status, retry_after=headers.get("Retry-After", ""))
        case FileNotFoundError():
            return status_error(404)
        case PermissionError():
            return status_error(403)
        case aiohttp.ClientSSLError() | aiohttp.ServerFingerprintMismatch():
            return RemoteError(_BAD_CERTIFICATE, passing=False)
        case aiohttp.InvalidURL() | aiohttp.RedirectClientError() | aiohttp.NonHttpUrlClientError():
            return RemoteError("the URL, or one that the server redirects to, is not valid", passing=False)
        case aiohttp.ClientConnectorError():
            return RemoteError(f"cannot connect ({error.os_error.strerror})", passing=True)
        case aiohttp.ClientPayloadError():
            return RemoteError("the body is cut off", passing=True)
        case aiohttp.ClientError():
            return RemoteError("the connection broke", passing=True)
        case _:
            return None


def _s3_store(timeout_seconds: float) -> Store:
    """Endpoint, region and credentials are what botocore finds: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ~/.aws, ..."""
    client = {
        "connect_timeout": timeout_seconds,
        "read_timeout": timeout_seconds,
        "retries": {"total_max_attempts": 1},
    }
    files = fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=client)
    files.retries = 1
    return Store(
        open=lambda url, start, end: _open_s3(files, url, start, end),
        list=lambda url: _list_bucket(files, url),
        explain=_explain_s3,
    )


async def _open_s3(files: Any, url: str, start: int, end: int) -> Answer:
    bucket, key, _ = files.split_path(url)
    reply = await files._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")
    return Answer(reply["ResponseMetadata"]["HTTPHeaders"], reply["Body"].read, reply["Body"].close)


async def _list_bucket(files: Any, url: str) -> list[Entry]:
    scheme, _, path = url.partition("://")
    entries = await files._ls(path.rstrip("/"), detail=True)
    return [Entry(f"{scheme}://{entry['name']}", entry["type"] == "directory") for entry in entries]


def _explain_s3(error: Exception) -> RemoteError | None:
    from botocore import exceptions as boto

    cause = error.__cause__ if isinstance(error.__cause__, boto.ClientError) else error  # s3fs makes OSErrors of them
    match cause:
        case boto.ClientError():
            meta, code = cause.response.get("ResponseMetadata", {}), cause.response.get("Error", {}).get("Code", "")
            retry_after = meta.get("HTTPHeaders", {}).get("retry-after", "")
            return status_error(meta.get("HTTPStatusCode", 0), code=code, retry_after=retry_after)
        case boto.NoCredentialsError():
            hint = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; FSSPEC_S3_ANON=true for a public bucket"
            return RemoteError(f"{_NO_CREDENTIALS} ({hint})", passing=False)
        case boto.SSLError():
            return RemoteError(_BAD_CERTIFICATE, passing=False)
        case (
            boto.ConnectionError() | boto.HTTPClientError() | boto.IncompleteReadError() | boto.FlexibleChecksumError()
        ):
            return RemoteError(f"the connection failed ({type(cause).__name__})", passing=True)
        case boto.BotoCoreError() | ValueError():
            hint = "check AWS_ENDPOINT_URL, which begins with http:// or https://, and the AWS configuration"
            return RemoteError(f"the request cannot be made ({type(cause).__name__}); {hint}", passing=False)
        case _:
            return explain_http(error)


def _gs_store() -> Store:
    files = fsspec.filesystem("gs", use_listings_cache=False)
    return Store(
        open=lambda url, start, end: _open_gs(files, url, start, end),
        list=lambda url: _list_bucket(files, url),
        explain=_explain_gs,
    )


async def _open_gs(files: Any, url: str, start: int, end: int) -> Answer:
    path = url.partition("://")[2]
    info = await files._info(path)
    size = int(info["size"])
    if start >= size:
        raise status_error(416)
    position, end = start, min(end, size)

    async def read(count: int) -> bytes:
        nonlocal position
        if position == end:
            return b""
        stop = min(position + count, end)
        chunk = await files._cat_file(path, start=position, end=stop, generation=info.get("generation"))
        position += len(chunk)
        return chunk

    headers = {"content-range": f"bytes {start}-{end - 1}/{size}", "etag": info.get("etag", "")}
    return Answer(headers, read, lambda: None)


def _explain_gs(error: Exception) -> RemoteError | None:
    from gcsfs.retry import HttpError  # pyright: ignore[reportMissingImports]
    from google.auth import exceptions as auth  # pyright: ignore[reportMissingImports]

    match error:
        case HttpError():
            return status_error(int(error.code or 0))
        case auth.TransportError():
            return RemoteError("the connection failed", passing=True)
        case auth.GoogleAuthError():
            return RemoteError(_NO_CREDENTIALS, passing=False)
        case OSError() if str(error).startswith("Forbidden"):
            return status_error(403)
        case _:
            return explain_http(error)
