"""Run folders: the same on a local disk and behind pyarrow, whole after a crash, and errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3_server

from raytrain.errors import ConfigError, StorageError, masked
from raytrain.storage.arrow import ArrowStorage
from raytrain.storage.local import LocalStorage
from raytrain.storage.paths import joined, parent_and_name, parse_temporary, temporary_name
from raytrain.storage.retry import AWS_CREDENTIALS, as_storage_error, may_pass, with_retries
from raytrain.storage.storage import Storage, open_storage


@pytest.fixture(params=["local", "arrow file", "arrow memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "local":
        yield open_storage(str(tmp_path / "run"))
        return
    if request.param == "s3":
        with s3_server.serving() as server:
            yield open_storage(server.uri("bucket/run"))
        return
    import pyarrow.fs

    if request.param == "arrow file":
        yield ArrowStorage(pyarrow.fs.LocalFileSystem(), f"{tmp_path}/run", f"file://{tmp_path}/run")
    else:
        yield ArrowStorage(pyarrow.fs._MockFileSystem(), "bucket/run", "mock://bucket/run")


def test_files_come_back_as_they_were_written(storage: Storage) -> None:
    storage.write_bytes("a/b/one", b"first")
    storage.write_bytes("a/b/one", b"second")
    storage.write_bytes("a/two", b"xyz")
    assert storage.read_bytes("a/b/one") == b"second"
    with storage.open_read("a/two") as file:
        assert file.read(2) == b"xy"
    assert storage.size("a/two") == 3
    assert storage.list("a") == ["b", "two"]
    assert storage.list("") == ["a"]
    assert storage.list("nothing/here") == []
    assert storage.exists("a") and storage.exists("a/two") and not storage.exists("a/three")
    with storage.local_copy("a/two") as path:
        assert path.read_bytes() == b"xyz"


def test_trees_are_renamed_and_removed(storage: Storage) -> None:
    storage.write_bytes("old/one", b"1")
    storage.write_bytes("old/two", b"2")
    storage.rename_tree("old", "deep/new")
    assert not storage.exists("old")
    assert storage.list("deep/new") == ["one", "two"]
    if storage.is_local:
        storage.rename_tree("old", "deep/new")  # again: the answer to the first was lost
    storage.remove_tree("deep/new/one")
    assert storage.list("deep/new") == ["two"]
    storage.remove_tree("deep/new")
    storage.remove_tree("deep/new")
    assert storage.list("deep") == []


def test_files_travel_between_this_machine_and_the_run_folder(storage: Storage, tmp_path: Path) -> None:
    local = tmp_path / "local.txt"
    local.write_bytes(b"x" * 3_000_000)
    storage.upload(local, "logs/copy.txt")
    storage.download("logs/copy.txt", tmp_path / "back.txt")
    assert (tmp_path / "back.txt").read_bytes() == local.read_bytes()


def test_a_file_is_compared_with_memory(storage: Storage) -> None:
    for size in (0, 5, 3 << 20, (9 << 20) + 4097):
        memory = memoryview(mmap.mmap(-1, size + 1))
        data = memory[:size]
        data[:] = random.Random(1).randbytes(size)
        for part in (data, data[1:]):  # aligned to pages, and not
            storage.write_bytes("ckpt/x", part)
            assert storage.same_bytes("ckpt/x", part)
            assert storage.read_bytes("ckpt/x") == part
        assert storage.list("ckpt") == ["x"]
        storage.write_bytes("ckpt/x", data)
        assert not storage.same_bytes("ckpt/x", memory)
        if size:
            data[size // 2] ^= 1
            assert not storage.same_bytes("ckpt/x", data)
            assert not storage.same_bytes("ckpt/x", data[:-1])


def test_what_does_not_exist_is_a_storage_error_with_the_path(storage: Storage) -> None:
    with pytest.raises(StorageError, match=r"run/none(\?\S*)?: cannot read"):
        storage.read_bytes("none")
    with pytest.raises(StorageError, match=r"run/none(\?\S*)?: cannot look at"):
        storage.size("none")


def test_a_file_url_is_a_local_folder_and_local_folders_are_absolute(tmp_path: Path, monkeypatch) -> None:
    storage = open_storage(f"file://{tmp_path}/my%20run")
    assert isinstance(storage, LocalStorage)
    assert storage.local_path("x") == tmp_path / "my run" / "x"
    monkeypatch.chdir(tmp_path)
    relative = open_storage("output/run")
    monkeypatch.chdir("/")
    assert relative.path_of("ckpt") == str(tmp_path / "output/run/ckpt")


def test_local_folders_do_not_import_pyarrow(tmp_path: Path) -> None:
    code = (
        "import sys; from raytrain.storage.storage import open_storage; s = open_storage(sys.argv[1]);"
        "s.write_bytes('a/b', b'1'); s.rename_tree('a', 'c'); s.remove_tree('c'); s.list('');"
        "sys.exit('pyarrow' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0


def test_names_go_before_the_options_of_a_uri() -> None:
    storage = ArrowStorage(None, "bucket/run", "s3://bucket/run/?region=eu-west-1")
    assert storage.path_of("ckpt/x") == "s3://bucket/run/ckpt/x?region=eu-west-1"
    assert storage.path_of("") == "s3://bucket/run?region=eu-west-1"
    with pytest.raises(StorageError, match="not on a disk of this machine"):
        storage.local_path("x")


def test_an_unknown_scheme_says_what_is_legal() -> None:
    with pytest.raises(ConfigError, match=r"s4://b/x: pyarrow cannot open this.*such as s3://bucket/folder"):
        open_storage("s4://b/x")


@pytest.mark.parametrize("path", ["./s3://b", "s3:/b/x", "s3:/run", "file:/x", "://x", "a://b", "/tmp/s3://b"])
def test_what_is_nearly_a_uri_is_told_and_not_made_a_folder(path: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{path}: this is neither a path nor a URI. Write a path, or a URI"):
        open_storage(path)


@pytest.mark.parametrize("uri", ["file://", "file://relative/x", "file://./x", "FILE://host/x"])
def test_a_file_uri_that_names_no_path_of_this_machine_is_told(uri: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{uri}: this names no path. Write it as file:///folder"):
        open_storage(uri)
    assert open_storage("file://localhost/x").path_of("") == "/x"


def test_the_home_folder_of_nobody_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^~no-such-user/x: there is no user of that name here"):
        open_storage("~no-such-user/x")


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write_bytes("config.yaml", b"old")
    with (
        file_size_limit(100_000),
        pytest.raises(StorageError, match=r"File too large.*Free some space or lower CHECKPOINT.KEEP_LAST"),
    ):
        storage.write_bytes("config.yaml", b"x" * 200_000)
    assert storage.read_bytes("config.yaml") == b"old"
    assert storage.list("") == ["config.yaml"]


def test_a_full_disk_says_so() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    told = r"/dev/full: cannot write: No space left on device. Free some space"
    with (
        pytest.raises(StorageError, match=told),
        as_storage_error("write", "/dev/full"),
        open("/dev/full", "wb") as file,
    ):
        file.write(b"x")


def test_a_read_only_folder_says_so() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o555)
        with as_somebody_without_rights():
            with pytest.raises(StorageError, match=r"run: cannot make the folder: Permission denied. Give the user"):
                open_storage(f"{folder}/run").makedirs("")
            with pytest.raises(StorageError, match=r"cannot write: Permission denied. Give the user"):
                open_storage(folder).write_bytes("config.yaml", b"x")


def test_a_file_in_the_way_of_a_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    storage = open_storage(str(tmp_path / "run"))
    assert not storage.exists("ckpt")
    with pytest.raises(StorageError, match="Something else stands at this path"):
        storage.write_bytes("ckpt/x", b"1")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("AWS Error NO_SUCH_BUCKET during HeadBucket operation", "there is no bucket of this name. Create it or"),
        ("Bucket 'b' not found. To create buckets, enable the allow_bucket_creation option", "name. Create it or"),
        ("AWS Error NETWORK_CONNECTION: curlCode: 7, Could not connect to server", "Check the network"),
    ],
)
def test_object_store_errors_say_what_to_do(text: str, advice: str) -> None:
    with pytest.raises(StorageError, match=rf"s3://b/run/x: cannot look at: .*{advice}"):
        refusing("s3://b/run", text).exists("x")


def refusing(uri: str, text: str) -> ArrowStorage:
    """One that fails with this text."""

    class Refusing:
        def get_file_info(self, _: object) -> None:
            raise OSError(text)

    return ArrowStorage(Refusing(), "b/run", uri, retry_s=0.0)


DENIED, FORBIDDEN = "AWS Error ACCESS_DENIED during PutObject operation", "AWS Error UNKNOWN (HTTP status 403)"
NO_DEFAULT = "google::cloud::Status(UNKNOWN: Could not find Application Default Credentials)"


@pytest.mark.parametrize(
    ("uri", "text", "has", "advice"),
    [
        (
            "s3://b/run",
            DENIED,
            "",
            r"There are no credentials here \(no AWS_ACCESS_KEY_ID.*: set AWS_ACCESS_KEY_ID and",
        ),
        ("s3://b/run", FORBIDDEN, "", r"There are no credentials here"),
        ("s3://b/run", DENIED, "AWS_ACCESS_KEY_ID", "Check the credentials"),
        ("s3://b/run", DENIED, "AWS_PROFILE", "Check the credentials"),
        ("s3://b/run", DENIED, "AWS_WEB_IDENTITY_TOKEN_FILE", "Check the credentials"),
        ("s3://b/run", DENIED, ".aws/credentials", "Check the credentials"),
        ("s3://b/run", DENIED, ".aws/config", "Check the credentials"),
        ("s3://key:***@b/run", FORBIDDEN, "", "Check the credentials"),
        ("gs://b/run", NO_DEFAULT, "", "Set GOOGLE_APPLICATION_CREDENTIALS to the key file"),
        ("gs://b/run", NO_DEFAULT, "GOOGLE_APPLICATION_CREDENTIALS", "Check the credentials"),
    ],
)
def test_where_nobody_is_let_in_it_says_what_to_set(
    uri: str, text: str, has: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*AWS_CREDENTIALS, "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if has.startswith("."):
        (tmp_path / ".aws").mkdir()
        (tmp_path / has).touch()
    elif has:
        monkeypatch.setenv(has, "something")
    with pytest.raises(StorageError, match=f"cannot look at: .*{advice}"):
        refusing(uri, text).exists("x")


@pytest.mark.parametrize(
    ("passes", "error"),
    [
        (True, OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Could not connect")),
        (True, OSError("AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate.")),
        (True, OSError("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.")),
        (True, OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)")),
        (True, OSError(errno.ESTALE, "Stale file handle")),
        (True, ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")),
        (
            False,
            OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 60, SSL peer certificate"),
        ),
        (False, OSError("AWS Error ACCESS_DENIED during HeadBucket operation: No response body.")),
        (False, OSError("AWS Error UNKNOWN (HTTP status 403) during HeadObject operation: No response body.")),
        (False, OSError("AWS Error NO_SUCH_BUCKET during PutObject operation: 503 timeouts")),
        (False, OSError(errno.EIO, "Input/output error")),
        (False, OSError(errno.ENOSPC, "No space left on device")),
        (False, FileNotFoundError(errno.ENOENT, "No such file or directory")),
    ],
)
def test_only_what_may_pass_is_tried_again(passes: bool, error: OSError) -> None:
    assert may_pass(error) == passes
    answers = [error, None]

    def operation() -> str:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return "done"

    if passes:
        assert with_retries("read", "x", operation, 1.0) == "done"
    else:
        with pytest.raises(StorageError, match="x: cannot read"):
            with_retries("read", "x", operation, 1.0)
        assert answers == [None]


def test_what_does_not_pass_in_time_says_how_often_it_was_tried() -> None:
    def operation() -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    drawn = random.getstate()
    with pytest.raises(StorageError, match=r"x: cannot list: Stale file handle \(tried [23] times in [01] s\)\. "):
        with_retries("list", "x", operation, 0.5)
    assert random.getstate() == drawn  # what training draws is not changed by a network


def test_a_long_download_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(20 << 20)
    with s3_server.serving() as server:
        open_storage(server.uri("bucket/run")).write_bytes("x", data)
        with server.spoilt(lambda number: "reset" if 3 <= number < 7 else None) as proxy:
            open_storage(server.uri("bucket/run", proxy.port)).download("x", tmp_path / "x")
            requests = next(proxy.requests) - 1
    assert (tmp_path / "x").read_bytes() == data
    assert proxy.spoilt == ["reset"] * 4
    assert requests == 8  # one to look at it, three to read it in parts of 8 MiB, and four in vain


def test_a_file_whose_writer_is_killed_in_mid_upload_is_the_old_one() -> None:
    code = (
        "import sys; from raytrain.storage.storage import open_storage;"
        "open_storage(sys.argv[1]).write_bytes('x', bytes(30 << 20))"
    )
    with s3_server.serving() as server:
        storage = open_storage(server.uri("bucket/run"))
        storage.write_bytes("x", b"old")
        with server.spoilt(lambda number: "hang" if number >= 3 else None) as proxy:  # the second of three parts
            command = [sys.executable, "-c", code, server.uri("bucket/run", proxy.port)]
            with subprocess.Popen(command) as writer:
                while not proxy.spoilt:
                    assert writer.poll() is None
                    time.sleep(0.01)
                writer.kill()
        assert storage.read_bytes("x") == b"old"
        assert storage.list("") == ["x"]


def test_secrets_are_not_shown() -> None:
    assert masked("s3://key:se%2Fcret@bucket/a?x=1: no") == "s3://key:***@bucket/a?x=1: no"
    assert masked("['OUTPUT', 's3://key:se/cret@bucket']") == "['OUTPUT', 's3://key:***@bucket']"
    plain = "hdfs://host:8020/run@3, s3://bucket/a@b and https://host/a:b@c"
    assert masked(plain) == plain
    with pytest.raises(ConfigError, match=r"s3://key:\*\*\*@bucket/run: the secret in this URI was masked.*AWS_SECRET"):
        open_storage("s3://key:***@bucket/run")


def test_temporary_names_tell_whether_their_writer_lives() -> None:
    assert parse_temporary("checkpoint_epoch_3") is None
    own = temporary_name("writing", "ckpt/checkpoint_epoch_3")
    folder, _, name = own.rpartition("/")
    assert folder == "ckpt"
    assert parse_temporary(name) == ("writing", "checkpoint_epoch_3", False)  # this process starts a run: not writing
    code = "from raytrain.storage.paths import temporary_name; print(temporary_name('trash', 'x'), flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdin and other.stdout
        name = other.stdout.readline().strip()
        if Path("/proc/self/stat").exists():
            assert parse_temporary(name) == ("trash", "x", True)
        other.stdin.close()
        other.wait()
        assert parse_temporary(name) == ("trash", "x", False)


@contextlib.contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """As on a full disk, writes fail beyond this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def as_somebody_without_rights() -> Iterator[None]:
    """Root may write everywhere, so it steps down meanwhile."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("root", "whole"),
    [
        ("/data/run", "/data/run/ckpt/a"),
        ("/data/what?/run/", "/data/what?/run/ckpt/a"),
        ("s3://bucket/run/", "s3://bucket/run/ckpt/a"),
        ("s3://bucket?region=eu-west-1", "s3://bucket/ckpt/a?region=eu-west-1"),
        ("s3://bucket/run?region=eu-west-1", "s3://bucket/run/ckpt/a?region=eu-west-1"),
    ],
)
def test_names_are_put_before_the_options_of_a_uri(root: str, whole: str) -> None:
    assert joined(root, "ckpt", "a") == whole
    assert parent_and_name(whole) == (joined(root, "ckpt"), "a")
