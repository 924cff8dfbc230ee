"""The same build to and from gs://, on an emulator of this machine."""

import re
import socket

import numpy as np
import pytest

from jaxcoder.data.build import WorkSizes, build_store
from jaxcoder.data.store import TokenStore
from jaxcoder.errors import DataError

gcsfs = pytest.importorskip("gcsfs", reason="needs the extra `gcs`")
emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator")

SMALL = {"shard_tokens": 8192, "sizes": WorkSizes(50_000, 50_000)}


@pytest.fixture(scope="module")
def server():
    """The emulator, taught two things that the service does and tensorstore asks for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    storage = running._api._storage
    get_header, write_file = emulator.Request.get_header, emulator.Response.write_file

    def with_suffix_ranges(request, key, default=None):
        value = get_header(request, key, default)
        suffix = re.fullmatch(r"bytes=-(\d+)", value or "")
        if key.lower() != "range" or not suffix:
            return value
        size = int(storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])["size"])
        return f"bytes={max(0, size - int(suffix[1]))}-"

    def with_generation(response, *arguments, **settings):
        response["X-Goog-Generation"] = "1"
        return write_file(response, *arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator.Request, "get_header", with_suffix_ranges)
        patch.setattr(emulator.Response, "write_file", with_generation)
        running.start()
        yield f"http://127.0.0.1:{port}"
        running.stop()


@pytest.fixture
def bucket(server, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)  # gcsfs
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anyone")  # tensorstore
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield "bucket"
    gcsfs.GCSFileSystem.clear_instance_cache()


def test_the_same_bytes_as_on_a_disk(tokenizer, documents_file, tmp_path, bucket):
    local = build_store(documents_file, tokenizer, tmp_path / "store", seed=3, **SMALL)
    remote = build_store(documents_file, tokenizer, f"gs://{bucket}/store", seed=3, **SMALL)
    assert remote.manifest == local.manifest
    remote.verify()
    for start in (0, 8000, remote.num_tokens - 500):
        assert np.array_equal(remote.read(start, start + 500), local.read(start, start + 500))
    assert remote.documents.equals(local.documents)


def test_a_bucket_that_is_not_there(tokenizer, documents_file, bucket):
    with pytest.raises(DataError, match="Cannot write gs://no-such-bucket/store/.*: create the bucket"):
        build_store(documents_file, tokenizer, "gs://no-such-bucket/store", seed=3)
    with pytest.raises(DataError, match="There is no token store at gs://no-such-bucket/store"):
        TokenStore.open("gs://no-such-bucket/store")
