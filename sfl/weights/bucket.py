"""Objects in a Google Cloud Storage bucket, by google-cloud-storage.

The library is imported when a bucket is opened, so runs without one do not need it: it is the
package's extra ``gcs``. Credentials are found as Google's libraries find them;
``STORAGE_EMULATOR_HOST`` names an emulator.
"""

import contextlib
import os
import queue
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sfl.errors import ConfigError, IntegrityError, RunError, not_installed
from sfl.weights.object_store import Metadata, check_size, compare, is_there
from sfl.wire.link import one_line

# https://cloud.google.com/storage/docs/buckets#naming
BUCKET_NAME = re.compile(r"(?!goog)[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
CONNECT_S, ANSWER_S = 10.0, 60.0  # deadlines of one attempt; --weights-timeout bounds all
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0  # between attempts


def parse_address(address: str) -> tuple[str, str]:
    """Return bucket and prefix of ``gs://BUCKET/PREFIX``.

    Raises:
        ConfigError: a part of the address is malformed.
    """
    bucket, _, prefix = address.removeprefix("gs://").partition("/")
    if not BUCKET_NAME.fullmatch(bucket):
        raise ConfigError(
            f"--weights {address}: {bucket!r} is no name of a bucket (3 to 222 lower-case letters,"
            " digits, '-', '_' and '.')"
        )
    prefix = prefix.strip("/")
    if not re.fullmatch(r"[A-Za-z0-9._/-]*", prefix) or ".." in prefix.split("/"):
        raise ConfigError(f"--weights {address}: {prefix!r} is no prefix of objects")
    return bucket, prefix


class Bucket:
    """Objects under a prefix of a bucket.

    ``timeout_s`` bounds each call with all its attempts and pauses, to within one attempt. ``say``
    reports an outage once. Downloads go through ``scratch``.

    Raises:
        ConfigError: the library is not installed, or a part of the address is malformed.
    """

    def __init__(
        self, address: str, scratch: Path, *, timeout_s: float, say: Callable[[str], None]
    ) -> None:
        try:
            import google.cloud.storage  # noqa: F401
        except ModuleNotFoundError as error:
            raise not_installed("google") from error
        self.title = address.rstrip("/")
        self._name, self._prefix = parse_address(address)
        self._scratch = scratch
        self._timeout_s = timeout_s
        self._say = say
        self._waiting = False
        # idle library buckets, each with its own connection
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def check(self) -> None:
        with self._call("list objects") as (bucket, options):
            found = bucket.list_blobs(prefix=self._object(""), max_results=1, **options())
            next(iter(found), None)

    def names(self, prefix: str) -> list[str]:
        with self._call("list objects") as (bucket, options):
            found = bucket.list_blobs(prefix=self._object(prefix), **options())
            return sorted(blob.name.removeprefix(self._object("")) for blob in found)

    def create(self, path: str, data: bytes, metadata: Metadata) -> None:
        from google.api_core.exceptions import Forbidden, PreconditionFailed

        with self._call(f"write {path}") as (bucket, options):
            blob = bucket.blob(self._object(path))
            blob.metadata = dict(metadata)
            try:
                blob.upload_from_string(
                    data,
                    content_type="application/octet-stream",
                    if_generation_match=0,
                    checksum="crc32c",
                    **options(),
                )
            except PreconditionFailed:
                # The object exists, perhaps from an earlier attempt of ours whose answer got lost.
                compare(self, path, data)
            except Forbidden:
                # An account that may not overwrite can get this error before the precondition is
                # checked.
                if not is_there(self, path, data):
                    raise

    def read(self, path: str, most_bytes: int | None = None) -> tuple[bytes, Metadata] | None:
        from google.api_core.exceptions import NotFound

        with self._call(f"read {path}") as (bucket, options):
            blob = bucket.get_blob(self._object(path), **options())
            if blob is None:
                return None
            check_size(f"{self.title}/{path}", blob.size, most_bytes)
            self._scratch.mkdir(parents=True, exist_ok=True)
            # A file without a name, so that foreign bytes never appear in a run's folder.
            with tempfile.TemporaryFile(dir=self._scratch) as file:
                try:
                    blob.download_to_file(
                        file, checksum="crc32c", if_generation_match=blob.generation, **options()
                    )
                except NotFound:
                    return None  # deleted since get_blob
                file.seek(0)
                data = file.read()
        return data, dict(blob.metadata or {})

    def delete(self, path: str) -> None:
        from google.api_core.exceptions import NotFound

        with self._call(f"delete {path}") as (bucket, options), contextlib.suppress(NotFound):
            bucket.blob(self._object(path)).delete(**options())

    def _object(self, path: str) -> str:
        return f"{self._prefix}/{path}" if self._prefix else path

    @contextlib.contextmanager
    def _call(self, what: str) -> Iterator[tuple[Any, Callable[[], dict[str, Any]]]]:
        """Yield the library's bucket for one call, and a function that gives a request's options.

        The options hold the time that is left. A bucket serves one thread at a time and is then
        reused.
        """
        with self._errors(what):
            try:
                bucket = self._free.get_nowait()
            except queue.Empty:
                bucket = self._open()
            end = time.monotonic() + self._timeout_s
            try:
                yield bucket, lambda: self._options(max(end - time.monotonic(), 0.1))
            finally:
                self._free.put(bucket)

    def _open(self) -> Any:
        from google.cloud import storage

        emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
        if emulator and ("://" not in emulator or emulator.endswith("/")):
            raise ConfigError(
                f"STORAGE_EMULATOR_HOST={emulator}: give it a scheme, and no slash at the end:"
                " http://127.0.0.1:9023"
            )
        return storage.Client(project=None).bucket(self._name)  # objects need no project

    def _options(self, left_s: float) -> dict[str, Any]:
        """Return the library's retry and deadline options, within the time that is left."""
        from google.cloud.storage.retry import DEFAULT_RETRY

        retry = DEFAULT_RETRY.with_timeout(left_s).with_delay(
            initial=FIRST_PAUSE_S,
            maximum=min(LONGEST_PAUSE_S, max(left_s / 8, 0.1)),
            multiplier=2.0,
        )
        return {
            "retry": lambda call: retry(call, on_error=self._note),
            "timeout": (min(CONNECT_S, left_s), min(ANSWER_S, left_s)),
        }

    def _note(self, error: Exception) -> None:
        if not self._waiting:
            self._waiting = True
            self._say(
                f"{self.title} does not answer ({_reason(error)});"
                f" trying again for {self._timeout_s:g} seconds"
            )

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Translate the library's errors into ours, one line each."""
        from google.api_core import exceptions
        from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
        from google.cloud.storage.exceptions import DataCorruption

        try:
            yield
            self._waiting = False
        except DefaultCredentialsError as error:
            raise ConfigError(
                f"no credentials for {self.title}: run 'gcloud auth application-default login', or"
                " set GOOGLE_APPLICATION_CREDENTIALS to a service account's file"
            ) from error
        except (exceptions.Forbidden, exceptions.Unauthorized) as error:
            raise RunError(
                f"no permission to {what} in {self.title}: the account needs the roles Storage"
                f" Object Creator and Storage Object Viewer there ({_reason(error)})"
            ) from error
        except exceptions.NotFound as error:
            raise RunError(f"there is no bucket {self._name!r} ({self.title})") from error
        except exceptions.RetryError as error:
            raise RunError(
                f"{self.title} did not answer for {self._timeout_s:g} seconds"
                f" ({_reason(error.cause or error)}): could not {what}; the run can be resumed,"
                " and --weights-timeout lets it wait longer"
            ) from error
        except GoogleAuthError as error:
            raise RunError(
                f"cannot log in to {self.title}: {_reason(error)}; if the account is right, check"
                " this machine's clock"
            ) from error
        except DataCorruption as error:
            raise IntegrityError(f"{self.title}: {what}: damaged on the way") from error
        except (exceptions.GoogleAPICallError, OSError) as error:
            raise RunError(f"cannot {what} in {self.title}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return an error's text in one line."""
    return one_line(" ".join(str(error).split()) or type(error).__name__, 160)
