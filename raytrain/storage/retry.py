"""Calls to disks and servers: what may pass is tried again, what will not becomes a StorageError at once."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from raytrain.errors import StorageError

RETRY_S = 60.0  # how long what may pass is tried again
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0

# The network's, and those of a network file system that is mounted. A bad sector (EIO) stays bad.
PASSING = {
    *(errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.EPIPE, errno.EHOSTUNREACH, errno.ENETUNREACH),
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED),
}
# Of AWS, Google Cloud and Hadoop. NO_SUCH_UPLOAD: the answer to one that got through was lost; all is sent again.
PASSING_TEXTS = (
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|THROTTLING|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT"
    r"|NO_SUCH_UPLOAD|UNKNOWN \(HTTP status (408|429|5\d\d)\))(?!.*curlCode: (3|51|58|60|77)\b)"  # those: certificates
    r"|google::cloud::Status\((UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|INTERNAL)\b"
    r"|(?i:timed out|connection (reset|refused|aborted|closed)|RetriableException|StandbyException)"
)

NO_BUCKET = r"no_?such_?bucket|bucket does not exist|^bucket .* not found"  # in lower case; Arrow's ask for options

# By any of these AWS's own library finds credentials.
AWS_CREDENTIALS = (
    *("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    *("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
)

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])


def with_retries(action: str, path: str, operation: Callable[[], T], retry_s: float = RETRY_S) -> T:
    """What `operation` gives, which may be done twice.

    An OSError that may pass is waited out, for retry_s in all, in ever longer pauses; any other
    and the last one is a StorageError: `path` cannot `action`.
    """
    began, tries, pause_s = time.monotonic(), 1, FIRST_PAUSE_S
    while True:
        try:
            return operation()
        except OSError as error:
            waited_s = time.monotonic() - began
            if not may_pass(error) or waited_s + pause_s > retry_s:
                tried = f" (tried {tries} times in {waited_s:.0f} s)" if tries > 1 else ""
                raise _failure(error, action, path, tried) from error
        # Workers that failed together shall not come back together. Never the generator that training draws from.
        time.sleep(random.SystemRandom().uniform(0.5, 1.0) * pause_s)
        tries, pause_s = tries + 1, min(2 * pause_s, LONGEST_PAUSE_S)


def retrying(action: str) -> Callable[[Method], Method]:
    """For methods of a storage, whose first argument is a name: called as by `with_retries`."""

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def tried(self: Any, name: str, *args: Any) -> Any:
            operation = functools.partial(method, self, name, *args)
            return with_retries(action, self.path_of(name), operation, self.retry_s)

        return cast(Method, tried)

    return decorate


@contextlib.contextmanager
def as_storage_error(action: str, path: str) -> Iterator[None]:
    """An OSError is told as by `with_retries`: for what cannot be done twice."""
    try:
        yield
    except OSError as error:
        raise _failure(error, action, path) from error


def may_pass(error: OSError) -> bool:
    """True if the same call may well succeed later. pyarrow tells most of its errors only as text."""
    if error.errno is not None:
        return error.errno in PASSING
    return re.search(PASSING_TEXTS, str(error)) is not None


def _failure(error: OSError, action: str, path: str, tried: str = "") -> StorageError:
    what = (error.strerror or str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    if error.errno is None and re.search(NO_BUCKET, str(error).lower()):
        what = "there is no bucket of this name"
    return StorageError(f"{path}: cannot {action}: {what}{tried}. {_advice(error, path)}")


def _advice(error: OSError, path: str) -> str:
    """What a person can do about `error`; pyarrow gives most of its own only as text."""
    match error.errno:
        case errno.EACCES | errno.EPERM:
            return "Give the user that runs raytrain access to it, or choose another OUTPUT"
        case errno.EROFS:
            return "The file system is read-only; choose another OUTPUT"
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return "Free some space or lower CHECKPOINT.KEEP_LAST, then run the same command again"
        case errno.ENOTDIR | errno.EISDIR | errno.EEXIST | errno.ENOTEMPTY:
            return "Something else stands at this path; move it away or choose another OUTPUT"
    text = str(error).lower()
    if re.search(r"libjvm|libhdfs|classpath", text):
        return (
            "hdfs:// needs Java and Hadoop on every node: set JAVA_HOME, HADOOP_HOME and CLASSPATH "
            "(`hadoop classpath --glob` prints it)"
        )
    if re.search(NO_BUCKET, text):
        return "Create it or correct its name in OUTPUT"
    if re.search(r"permanent_?redirect|http status 301", text):
        return "The bucket is in another region: name it in the URI, as s3://bucket/folder?region=eu-west-1"
    if re.search(r"signature", text):
        return "The secret does not belong to the access key: check AWS_SECRET_ACCESS_KEY, on every node"
    if re.search(r"access.?denied|credential|access.?key|expired.?token|http status 40[13]|forbidden", text):
        return _credentials_advice(path)
    if re.search(r"connect|timeout|timed out|resolve|network|curl", text):
        return "Check the network of this machine and the endpoint in the URI"
    if isinstance(error, FileNotFoundError):
        return "It does not exist, or something removed it meanwhile"
    return "Check that the path is right and the storage is healthy"


def _credentials_advice(path: str) -> str:
    """What to set where a server lets nobody in."""
    scheme = path.partition("://")[0].lower()
    if scheme == "s3" and "@" not in path and not has_aws_credentials():
        return (
            "There are no credentials here (no AWS_ACCESS_KEY_ID, AWS_PROFILE or ~/.aws/credentials): set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on every node, or give its role the right to this bucket"
        )
    if scheme in ("gs", "gcs") and not os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
        return (
            "Set GOOGLE_APPLICATION_CREDENTIALS to the key file of a service account on every node (or run "
            "`gcloud auth application-default login` there), and see to its rights"
        )
    return "Check the credentials of the machine that raytrain runs on (every node has its own) and their rights"


def has_aws_credentials() -> bool:
    """Whether this machine names any, other than by its role."""
    home = Path(os.environ.get("HOME", "/"), ".aws")
    files = {"AWS_SHARED_CREDENTIALS_FILE": home / "credentials", "AWS_CONFIG_FILE": home / "config"}
    named = any(os.environ.get(name) for name in AWS_CREDENTIALS)
    return named or any(Path(os.environ.get(name, file)).is_file() for name, file in files.items())
