"""A real S3 protocol server (moto's) on loopback, for run folders behind a URI, and a proxy that spoils requests."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import select
import socket
import socketserver
import struct
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

import boto3
import pyarrow.fs
from moto.server import ThreadedMotoServer

BUCKET = "bucket"  # the one that there is
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
EVERYTHING = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'


class Server:
    """A started server with one empty bucket. It takes any key and secret, until it is told who may come in."""

    def __init__(self, moto: ThreadedMotoServer) -> None:
        self.host, self.port = moto.get_host_and_port()
        self.key, self.secret = "key", "secret"
        # What is stored is the process's: each block starts empty.
        self._post("reset", b"")
        self._post("reset-auth", b"inf")
        self.filesystem(allow_bucket_creation=True).create_dir(BUCKET)

    def uri(self, path: str, port: int | None = None) -> str:
        """pyarrow's URI of bucket/folder, with the key, the secret and the endpoint in it."""
        keys = f"{self.key}:{urllib.parse.quote(self.secret, safe='')}@"
        return self.bare_uri(path, port).replace("://", f"://{keys}")

    def bare_uri(self, path: str, port: int | None = None) -> str:
        """The same, to be opened with the key and the secret of the environment."""
        return f"s3://{path}?scheme=http&endpoint_override={self.host}:{port or self.port}&region=us-east-1"

    @property
    def objects(self) -> list[str]:
        """bucket/key of every object."""
        everything = pyarrow.fs.FileSelector(BUCKET, recursive=True)
        return [info.path for info in self.filesystem().get_file_info(everything) if info.is_file]

    def filesystem(self, **options: bool) -> pyarrow.fs.S3FileSystem:
        return pyarrow.fs.S3FileSystem(
            access_key=self.key,
            secret_key=self.secret,
            endpoint_override=f"{self.host}:{self.port}",
            scheme="http",
            region="us-east-1",
            **options,
        )

    def let_in_one_user(self) -> None:
        """Only `key` and `secret`, which are new, are let in from now on."""
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        with contextlib.closing(boto3.client("iam", endpoint_url=f"http://{self.host}:{self.port}", **keys)) as iam:
            iam.create_user(UserName="user")
            iam.put_user_policy(UserName="user", PolicyName="policy", PolicyDocument=EVERYTHING)
            made = iam.create_access_key(UserName="user")["AccessKey"]
        self.key, self.secret = made["AccessKeyId"], made["SecretAccessKey"]
        self._post("reset-auth", b"0")

    @contextlib.contextmanager
    def spoilt(self, fault: Callable[[int], str | None]) -> Iterator[Proxy]:
        """A proxy before the server; `fault` says what becomes of request number 1, 2, ...: see Proxy."""
        with Proxy((self.host, self.port), fault) as proxy:
            threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}).start()
            try:
                yield proxy
            finally:
                proxy.ended.set()
                proxy.shutdown()

    def _post(self, what: str, data: bytes) -> None:
        url = f"http://{self.host}:{self.port}/moto-api/{what}"
        urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "text/plain"})).close()


class Proxy(socketserver.ThreadingTCPServer):
    """Hands requests on, but for those of which `fault` gives a word:

    "reset":     the connection is reset, and the server never hears of it
    "lost":      the server does it, but the connection is reset before the answer
    "slow down": the answer is 503 SlowDown
    "hang":      there is no answer until the client gives up
    """

    daemon_threads = True

    def __init__(self, server: tuple[str, int], fault: Callable[[int], str | None]) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.server, self.fault = server, fault
        self.requests = itertools.count(1)
        self.ended = threading.Event()
        self.spoilt: list[str] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Connection(socketserver.BaseRequestHandler):
    """A client's connection; requests follow one another, each begins a packet."""

    server: Proxy

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError), socket.create_connection(self.server.server) as server:
            lost = False
            while True:
                for source in select.select([self.request, server], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return None
                    if source is server:
                        if lost:
                            return self.reset()
                        self.request.sendall(data)
                        continue
                    fault = self.fault_of(data)
                    if fault == "reset":
                        return self.reset()
                    if fault == "slow down":
                        return self.slow_down()
                    if fault == "hang":
                        self.server.ended.wait()
                        return None
                    lost = lost or fault == "lost"
                    server.sendall(data)

    def fault_of(self, data: bytes) -> str | None:
        if not data.startswith((b"GET ", b"PUT ", b"HEAD ", b"POST ", b"DELETE ")):
            return None
        fault = self.server.fault(next(self.server.requests))
        if fault is not None:
            self.server.spoilt.append(fault)
        return fault

    def reset(self) -> None:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.request.close()

    def slow_down(self) -> None:
        head = f"HTTP/1.1 503 Slow Down\r\nContent-Length: {len(SLOW_DOWN)}\r\nConnection: close\r\n\r\n"
        self.request.sendall(head.encode() + SLOW_DOWN)


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """It is empty, and nobody else's for the time of the block."""
    yield Server(started())


@functools.cache
def started() -> ThreadedMotoServer:
    """One for the life of the process: each takes half a second to end."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    moto.start()
    return moto
