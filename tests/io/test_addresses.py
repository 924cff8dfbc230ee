"""Buckets without credentials end in one sentence, at once."""

from types import SimpleNamespace

import fsspec
import pytest

from jaxcoder.cli.data_look import run_config
from jaxcoder.errors import DataError
from jaxcoder.io.addresses import open_address


def client(token=None, method="anon", base="https://storage.googleapis.com/storage/v1/"):
    return SimpleNamespace(credentials=SimpleNamespace(token=token, method=method), base=base)


def test_a_bucket_at_google_without_credentials(monkeypatch):
    def answer(fs):
        monkeypatch.setattr(fsspec, "url_to_fs", lambda path: (fs, "bucket/store"))

    answer(client())
    with pytest.raises(DataError, match="no credentials for gs://bucket/store: give some.*FSSPEC_GCS_TOKEN=anon"):
        open_address("gs://bucket/store")
    for fs in (client(token="anon"), client(method="google_default"), client(base="http://localhost:9023/storage/v1/")):
        answer(fs)
        assert open_address("gs://bucket/store") == (fs, "bucket/store")


def test_looking_for_a_run_where_access_is_refused(monkeypatch):
    def refuse(_):
        raise PermissionError("Forbidden")

    monkeypatch.setattr(fsspec, "url_to_fs", lambda path: (SimpleNamespace(exists=refuse), "bucket/store"))
    with pytest.raises(DataError, match="Cannot read s3://bucket/store/config.json.*give credentials"):
        run_config("s3://bucket/store")
