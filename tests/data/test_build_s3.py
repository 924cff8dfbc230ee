"""The same build to and from s3://, on an S3-compatible server of this machine; and the errors when it cannot work.

The client of fsspec and tensorstore's own both find the server through AWS_ENDPOINT_URL, as they would a real one.
"""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxcoder.data.build import WorkSizes, build_store
from jaxcoder.data.store import TokenStore
from jaxcoder.errors import DataError
from jaxcoder.tokenizer.tokenizer import Tokenizer

pytest.importorskip("s3fs", reason="needs the extra `s3`")
pytest.importorskip("moto", reason="needs moto, a local S3-compatible server")
pytest.importorskip("flask_cors", reason="moto's server needs flask-cors")

SMALL = {"shard_tokens": 8192, "sizes": WorkSizes(50_000, 50_000)}
names = (f"bucket-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def credentials(server, tmp_path, monkeypatch):
    """An environment with the server and with credentials; nothing of this machine's own."""
    import s3fs

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3fs.S3FileSystem()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(credentials):
    name = next(names)
    credentials.mkdir(name)
    return name


def files_of(fs, root: str) -> dict[str, bytes]:
    fs.invalidate_cache()
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}


def test_the_same_bytes_as_on_a_disk(tokenizer, documents_file, tmp_path, credentials, bucket):
    credentials.put_file(str(documents_file), f"{bucket}/corpus/documents.parquet")
    local = build_store(documents_file, tokenizer, tmp_path / "store", seed=3, **SMALL)
    remote = build_store(f"s3://{bucket}/corpus", tokenizer, f"s3://{bucket}/store", seed=3, **SMALL)
    files = files_of(credentials, f"{bucket}/store")
    assert files == {
        str(path.relative_to(tmp_path / "store")): path.read_bytes()
        for path in (tmp_path / "store").rglob("*")
        if path.is_file()
    }
    assert len([name for name in files if name.startswith("tokens/c/")]) > 3
    for start in (0, 8000, remote.num_tokens - 500):  # windows, over the edges of shards too
        assert np.array_equal(remote.read(start, start + 500), local.read(start, start + 500))
    assert remote.documents.equals(local.documents)
    assert remote.tokenizer().fingerprint == tokenizer.fingerprint
    remote.verify()


def test_killed_and_resumed(tokenizer, documents_file, credentials, bucket, monkeypatch):
    tiny = {"shard_tokens": 8192, "sizes": WorkSizes(10_000, 20_000)}
    build_store(documents_file, tokenizer, f"s3://{bucket}/undisturbed", seed=3, **tiny)
    uploads = {name: getattr(credentials, name) for name in ("pipe_file", "put_file")}
    count = 0

    def dying(upload):
        def dies(*arguments, **settings):
            nonlocal count
            count += 1
            if count % 13 == 0:  # a build writes nine small files before its first task
                raise KeyboardInterrupt
            return upload(*arguments, **settings)

        return dies

    for name, upload in uploads.items():  # of the one instance that all of this process use
        monkeypatch.setattr(credentials, name, dying(upload))
    kills = 0
    for _ in range(20):
        try:
            build_store(documents_file, tokenizer, f"s3://{bucket}/store", seed=3, **tiny)
            break
        except KeyboardInterrupt:
            kills += 1
    for name, upload in uploads.items():
        monkeypatch.setattr(credentials, name, upload)
    assert kills > 2
    assert files_of(credentials, f"{bucket}/store") == files_of(credentials, f"{bucket}/undisturbed")


def test_the_command_with_two_processes(tokenizer, documents_file, tmp_path, credentials, bucket):
    tokenizer.save(tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").iterdir():
        credentials.put_file(str(file), f"{bucket}/tokenizer/{file.name}")
    assert Tokenizer.load(f"s3://{bucket}/tokenizer").fingerprint == tokenizer.fingerprint
    program = "import sys; from jaxcoder.cli.main import main; sys.exit(main())"
    words = ["data", "build", str(documents_file), "--tokenizer", f"s3://{bucket}/tokenizer", "--workers", "2"]
    finished = subprocess.run(
        [sys.executable, "-c", program, *words, "--seed", "3", "--output-dir", f"s3://{bucket}/store"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert f"--data.store s3://{bucket}/store" in finished.stdout
    build_store(documents_file, tokenizer, tmp_path / "store", seed=3)
    store, expected = TokenStore.open(f"s3://{bucket}/store"), TokenStore.open(tmp_path / "store")
    assert store.manifest == expected.manifest


def test_damage_is_found(tokenizer, documents_file, credentials, bucket):
    path = f"s3://{bucket}/store"
    build_store(documents_file, tokenizer, path, seed=3, **SMALL)
    shard = f"{bucket}/store/tokens/c/1"
    whole = credentials.cat_file(shard)
    credentials.pipe_file(shard, whole[:100] + bytes([whole[100] ^ 16]) + whole[101:])
    store = TokenStore.open(path)
    assert len(store.read(0, 8192)) == 8192
    with pytest.raises(DataError, match=f"The token store {path} is damaged: tokens/c/1 cannot be read"):
        store.read(8192, 9000)
    credentials.pipe_file(shard, whole[:-5])
    with pytest.raises(DataError, match=f"tokens/c/1 has {len(whole) - 5} bytes instead of {len(whole)}"):
        TokenStore.open(path)
    credentials.rm_file(shard)
    with pytest.raises(DataError, match="tokens/c/1 is missing"):
        TokenStore.open(path)


def test_a_bucket_that_is_not_there(tokenizer, documents_file, credentials):
    with pytest.raises(DataError, match="Cannot write s3://no-such-bucket/store/.*bucket does not exist.*create the b"):
        build_store(documents_file, tokenizer, "s3://no-such-bucket/store", seed=3)
    with pytest.raises(DataError, match="There is no token store at s3://no-such-bucket/store"):
        TokenStore.open("s3://no-such-bucket/store")
    with pytest.raises(DataError, match="There are no documents at s3://no-such-bucket/corpus"):
        build_store("s3://no-such-bucket/corpus", tokenizer, "s3://no-such-bucket/store", seed=3)
    with pytest.raises(DataError, match="Cannot read the tokenizer s3://no-such-bucket/tokenizer"):
        Tokenizer.load("s3://no-such-bucket/tokenizer")


def test_no_credentials(tokenizer, documents_file, credentials, monkeypatch):
    import s3fs

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    for use in (
        lambda: TokenStore.open("s3://bucket/store"),
        lambda: build_store(documents_file, tokenizer, "s3://bucket/store", seed=3),
        lambda: build_store("s3://bucket/corpus", tokenizer, "s3://bucket/store", seed=3),
    ):
        with pytest.raises(DataError, match=r"Cannot read s3://bucket/\w+ \(Unable to locate credentials\): give cred"):
            use()
    with pytest.raises(DataError, match="Cannot read the tokenizer .*Unable to locate credentials"):
        Tokenizer.load("s3://bucket/tokenizer")


def test_a_server_that_does_not_answer(credentials, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match="Cannot read s3://bucket/store .*Could not connect.*: check the address"):
        TokenStore.open("s3://bucket/store")
