"""A real S3 protocol server (moto's) on loopback, for run folders behind a URI."""

from __future__ import annotations

import contextlib
import logging
import urllib.request
from collections.abc import Iterator

import pyarrow.fs
from moto.server import ThreadedMotoServer

BUCKET = "bucket"  # the one that there is


class Server:
    """A started server with one empty bucket."""

    def __init__(self, moto: ThreadedMotoServer) -> None:
        self.host, self.port = moto.get_host_and_port()
        # All servers of a process share what is stored: each starts empty.
        urllib.request.urlopen(f"http://{self.host}:{self.port}/moto-api/reset", data=b"").close()
        self.filesystem(allow_bucket_creation=True).create_dir(BUCKET)

    def uri(self, path: str) -> str:
        """pyarrow's URI of bucket/folder, with the key, the secret and the endpoint in it."""
        endpoint = f"scheme=http&endpoint_override={self.host}:{self.port}&region=us-east-1"
        return f"s3://key:secret@{path}?{endpoint}"

    @property
    def objects(self) -> list[str]:
        """bucket/key of every object."""
        everything = pyarrow.fs.FileSelector(BUCKET, recursive=True)
        return [info.path for info in self.filesystem().get_file_info(everything) if info.is_file]

    def filesystem(self, **options: bool) -> pyarrow.fs.S3FileSystem:
        return pyarrow.fs.S3FileSystem(
            access_key="key",
            secret_key="secret",
            endpoint_override=f"{self.host}:{self.port}",
            scheme="http",
            region="us-east-1",
            **options,
        )


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    moto.start()
    try:
        yield Server(moto)
    finally:
        moto.stop()
