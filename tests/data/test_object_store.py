import gzip
import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from launcher.data.source import chunks, column_names, count_rows, list_files, read, refuse, stamp
from launcher.errors import DataError

TABLE = pa.table({"x": list(range(50)), "text": [f"t{i}" for i in range(50)]})


def contents() -> dict[str, bytes]:
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in TABLE.to_pylist())
    parquet, stream, file = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pq.write_table(TABLE, parquet, row_group_size=10)
    with ipc.new_stream(stream, TABLE.schema) as out:
        out.write_table(TABLE, max_chunksize=10)
    with ipc.new_file(file, TABLE.schema) as out:
        out.write_table(TABLE, max_chunksize=10)
    return {
        "a.parquet": parquet.getvalue(),
        "b 1%.jsonl": lines,
        "c.jsonl.gz": gzip.compress(lines),
        "d.arrow": file.getvalue(),
        "e.arrow": stream.getvalue(),
        "f.csv": b"x,text\n" + b"".join(f"{i},t{i}\n".encode() for i in range(50)),
        "sub/g.jsonl": lines,
        "README.md": b"",
    }


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        system = pafs.S3FileSystem(
            endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True
        )
        system.create_dir("bucket")
        for name, content in contents().items():
            with system.open_output_stream(f"bucket/data/{name}", compression=None) as out:
                out.write(content)
        yield f"{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
    return "s3://bucket"


def numbers_of(files: list[str], target_bytes: int = 300) -> list[int]:
    found = chunks(files, target_bytes=target_bytes)
    return [x for chunk in found for rows in read(chunk, ["x"], reject=refuse) for x in rows.columns["x"]]


def test_directories_and_patterns(bucket: str) -> None:
    names = ["a.parquet", "b%201%25.jsonl", "c.jsonl.gz", "d.arrow", "e.arrow", "f.csv"]
    for given in (f"{bucket}/data", f"{bucket}/data/", f"{bucket}/data/*"):
        assert list_files(given) == [f"{bucket}/data/{name}" for name in names]
    assert list_files(f"{bucket}/*/*.parquet") == [f"{bucket}/data/a.parquet"]
    assert list_files(f"{bucket}/data/**/*.jsonl")[1:] == [f"{bucket}/data/sub/g.jsonl"]
    assert list_files(f"{bucket}/data/a.parquet") == [f"{bucket}/data/a.parquet"]


@pytest.mark.parametrize("name", ["a.parquet", "b%201%25.jsonl", "c.jsonl.gz", "d.arrow", "e.arrow", "f.csv"])
def test_every_format(bucket: str, name: str) -> None:
    file = f"{bucket}/data/{name}"
    assert column_names([file]) == ["x", "text"]
    assert numbers_of([file]) == list(range(50))
    count, is_exact = count_rows([file])
    assert (count, is_exact) == (50, True) if name != "e.arrow" else count > 0 and not is_exact
    assert len(chunks([file], target_bytes=300)) == {"a": 5, "b": 4, "d": 5}.get(name[0], 1)
    (size, changed_ns) = stamp(file)
    assert size > 0 and abs(time.time() - changed_ns / 1e9) < 600
    (rows, *_) = read(chunks([file])[0], ["x"], reject=refuse)
    assert rows.where(3) == f"{file}, {'line' if 'json' in name else 'row'} 4"


def test_the_endpoint_may_stand_in_the_uri(server: str) -> None:
    query = f"?endpoint_override={server}&scheme=http"
    (file,) = list_files(f"s3://key:secret@bucket/data/*.parquet{query}")
    assert file == f"s3://key:secret@bucket/data/a.parquet{query}"
    assert numbers_of([file]) == list(range(50))
    assert [stamp(f)[0] > 0 for f in list_files(f"s3://bucket/data{query}")] == [True] * 6


def test_what_is_not_there(bucket: str) -> None:
    with pytest.raises(DataError, match=f"^{bucket}/data/z.parquet: no such file$"):
        list_files(f"{bucket}/data/z.parquet")
    with pytest.raises(DataError, match=r"/\*\.feather: no such file$"):
        list_files(f"{bucket}/data/*.feather")
    for given in ("s3://absent/x.parquet", "s3://absent/*.parquet", "s3://absent"):
        with pytest.raises(
            DataError, match='^s3://absent.*: no such bucket "absent", or no right to see it$'
        ):
            list_files(given)
    for use in (stamp, lambda file: column_names([file]), lambda file: chunks([file])):
        with pytest.raises(DataError, match=f"^{bucket}/data/z.parquet: no such file$"):
            use(f"{bucket}/data/z.parquet")
    with pytest.raises(DataError, match="not for the bucket"):
        list_files("s3://buck*/x.parquet")


@pytest.mark.parametrize("listens", [False, True])
def test_an_endpoint_that_does_not_answer(
    server: str, listens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as endpoint:
        endpoint.bind(("127.0.0.1", 0))
        if listens:
            endpoint.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{endpoint.getsockname()[1]}")
        began_s = time.monotonic()
        with pytest.raises(DataError, match=r"^s3://bucket/data/a\.parquet: [^\n]+$"):
            list_files("s3://bucket/data/a.parquet")
        assert time.monotonic() - began_s < 16


def test_whatever_fsspec_reaches() -> None:
    system = fsspec.filesystem("memory")
    for name, content in contents().items():
        system.pipe(f"/data/{name}", content)
    files = list_files("memory://data/*.*")
    assert len(files) == 6 and all(file.startswith("memory://data/") for file in files)
    for file in files:
        assert numbers_of([file]) == list(range(50))
        assert stamp(file)[0] > 0 and stamp(file)[1] > 0
    with pytest.raises(DataError, match="memory://data/z.csv: no such file"):
        list_files("memory://data/z.csv")


def test_other_stores_name_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="^abfs://container@account.dfs.core.windows.net/x.csv: .+"):
        list_files("abfs://container@account.dfs.core.windows.net/x.csv")
    with pytest.raises(DataError, match=r"^gs://\*\*\*@bucket/x.csv\?.*: .+"):
        list_files(
            "gs://anonymous@bucket/x.csv?endpoint_override=127.0.0.1:9&scheme=http&retry_limit_seconds=1"
        )
