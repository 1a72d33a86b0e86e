"""Objects in a Google Cloud Storage bucket, through google-cloud-storage.

The library is imported when a bucket is first used: a run without one does without it. Credentials
are found as Google's libraries find them; ``STORAGE_EMULATOR_HOST`` names an emulator.
"""

import contextlib
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sfl.errors import ConfigError, IntegrityError, RunError
from sfl.link import one_line
from sfl.objects import Metadata, compare

# https://cloud.google.com/storage/docs/buckets#naming
BUCKET_NAME = re.compile(r"(?!goog)[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
CONNECT_S, ANSWER_S = 10.0, 60.0  # a single try's deadlines; the whole call's is the user's
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0  # between tries


def parse_address(address: str) -> tuple[str, str]:
    """Return bucket and prefix of ``gs://BUCKET/PREFIX``.

    Raises:
        ConfigError: it is none.
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

    ``timeout_s`` bounds every call, tries and pauses together; ``say`` hears, once for each time
    that the bucket stays away, what is being waited for. Downloads go through ``scratch``.
    """

    def __init__(
        self, address: str, scratch: Path, *, timeout_s: float, say: Callable[[str], None]
    ) -> None:
        self.title = address.rstrip("/")
        self._name, self._prefix = parse_address(address)
        self._scratch = scratch
        self._timeout_s = timeout_s
        self._say = say
        self._waiting = False
        self._local = threading.local()
        self._credentials: Any = None

    def check(self) -> None:
        with self._errors("list objects"):
            bucket = self._bucket()
            options = {"retry": self._retry(), "timeout": (CONNECT_S, ANSWER_S)}
            prefix = self._object("")
            next(iter(bucket.list_blobs(prefix=prefix, max_results=1, **options)), None)

    def create(self, path: str, data: bytes, metadata: Metadata) -> None:
        from google.api_core.exceptions import PreconditionFailed

        with self._errors(f"write {path}"):
            blob = self._bucket().blob(self._object(path))
            blob.metadata = dict(metadata)
            try:
                blob.upload_from_string(
                    data,
                    content_type="application/octet-stream",
                    if_generation_match=0,
                    checksum="crc32c",
                    retry=self._retry(),
                    timeout=(CONNECT_S, ANSWER_S),
                )
            except PreconditionFailed:
                # Somebody was first: perhaps ourselves, in a try whose answer got lost.
                compare(self, path, data)

    def read(self, path: str) -> tuple[bytes, Metadata] | None:
        from google.api_core.exceptions import NotFound

        timeouts = {"retry": self._retry(), "timeout": (CONNECT_S, ANSWER_S)}
        with self._errors(f"read {path}"):
            blob = self._bucket().get_blob(self._object(path), **timeouts)
            if blob is None:
                return None
            self._scratch.mkdir(parents=True, exist_ok=True)
            whole = self._scratch / uuid.uuid4().hex
            partial = whole.with_suffix(".tmp")
            try:
                blob.download_to_filename(
                    partial, checksum="crc32c", if_generation_match=blob.generation, **timeouts
                )
                partial.rename(whole)
                data = whole.read_bytes()
            except NotFound:
                return None  # deleted in between
            finally:
                for file in (partial, whole):
                    file.unlink(missing_ok=True)
        return data, dict(blob.metadata or {})

    def delete(self, path: str) -> None:
        from google.api_core.exceptions import NotFound

        with self._errors(f"delete {path}"), contextlib.suppress(NotFound):
            blob = self._bucket().blob(self._object(path))
            blob.delete(retry=self._retry(), timeout=(CONNECT_S, ANSWER_S))

    def _object(self, path: str) -> str:
        return f"{self._prefix}/{path}" if self._prefix else path

    def _bucket(self) -> Any:
        """Return the library's bucket, with a connection pool for each thread."""
        from google.cloud import storage

        if not hasattr(self._local, "bucket"):
            client = storage.Client(credentials=self._credentials)
            self._credentials = client._credentials
            self._local.bucket = client.bucket(self._name)
        return self._local.bucket

    def _retry(self) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
        """Return the library's retry, with our deadline, saying once that we wait."""
        from google.cloud.storage.retry import DEFAULT_RETRY

        retry = DEFAULT_RETRY.with_timeout(self._timeout_s).with_delay(
            initial=FIRST_PAUSE_S, maximum=LONGEST_PAUSE_S, multiplier=2.0
        )
        return lambda call: retry(call, on_error=self._note)

    def _note(self, error: Exception) -> None:
        if not self._waiting:
            self._waiting = True
            self._say(
                f"{self.title} does not answer ({_reason(error)});"
                f" trying again for {self._timeout_s:g} seconds"
            )

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn the library's errors into ours, a line each."""
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
    """Return an error's own words, in one line."""
    return one_line(" ".join(str(error).split()) or type(error).__name__, 160)
