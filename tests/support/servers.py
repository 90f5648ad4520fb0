"""nginx and servers of S3 and Google Cloud Storage on this machine, started for tests and stopped afterwards."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest

S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _wait(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"no server on port {port}: {log.read_text()}")


@contextmanager
def _running(command: list[str], port: int, log: Path, **options) -> Iterator[int]:
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options)
    try:
        _wait(port, process, log)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def nginx(root: Path, folder: Path) -> Iterator[int]:
    """Serves the files of `root`. Its configuration and logs are in `folder`. Yields the port."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("needs nginx: apt-get install nginx")
    folder.mkdir(parents=True)
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"""
        {user} daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
        events {{ worker_connections 512; }}
        http {{
            access_log {folder}/access.log; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
            fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
            server {{ listen 127.0.0.1:{port}; root {root}; }}
        }}
        """
    )
    command = [program, "-c", str(folder / "nginx.conf"), "-p", str(folder), "-e", str(folder / "start.log")]
    with _running(command, port, folder / "output.log"):
        yield port


@contextmanager
def s3(shards: Path, folder: Path) -> Iterator[int]:
    """An S3 server (moto) with the files of `shards` in `s3://bucket/shards`. Yields the port."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        pytest.skip("needs moto's server: pip install 'moto[server]'")
    if importlib.util.find_spec("s3fs") is None:
        pytest.skip("needs s3fs: pip install s3fs")
    folder.mkdir(parents=True)
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, port, folder / "moto.log", env={**os.environ, **S3_ENVIRONMENT}):
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        client.create_bucket(Bucket="bucket")
        for path in sorted(path for path in shards.iterdir() if path.is_file()):
            client.upload_file(str(path), "bucket", f"shards/{path.name}")
        yield port


@contextmanager
def gcs(shards: Path, folder: Path) -> Iterator[str]:
    """An emulator of Google Cloud Storage with the files of `shards` in `gs://bucket/shards`. Yields its URL."""
    for package in ("gcsfs", "gcp_storage_emulator"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install {package.replace('_', '-')}")
    folder.mkdir(parents=True)
    port = free_port()
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(port)]
    with _running([*command, "--in-memory", "--default-bucket", "bucket"], port, folder / "emulator.log"):
        url = f"http://127.0.0.1:{port}"
        for path in sorted(path for path in shards.iterdir() if path.is_file()):
            upload_to_gcs(url, path)
        yield url


def upload_to_gcs(url: str, path: Path) -> None:
    """Uploads a file to `gs://bucket/shards` of an emulator, in place of one with the same name."""
    connection = HTTPConnection(url.partition("://")[2], timeout=60)
    target = f"/upload/storage/v1/b/bucket/o?uploadType=media&name=shards/{path.name}"
    connection.request("POST", target, path.read_bytes(), {"Content-Type": "application/octet-stream"})
    assert connection.getresponse().status == 200
    connection.close()
