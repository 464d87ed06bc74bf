"""A real S3 server on this machine for tests and benchmarks: versitygw over a folder."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

CREDENTIALS: Mapping[str, str] = {
    "AWS_ACCESS_KEY_ID": "key-of-a-test",
    "AWS_SECRET_ACCESS_KEY": "only-on-this-machine",
    "AWS_DEFAULT_REGION": "us-east-1",
}
"""What a client of the server needs in its environment."""
START_S = 60.0
"""Longest time until the server listens."""
ONE_AT_A_TIME = ("--concurrency", "1")
"""With these options of its folder back end versitygw's conditional create holds; by default it loses races."""


@contextmanager
def s3_server(binary: Path, folder: Path, *options: str) -> Iterator[str]:
    """Runs versitygw over ``folder`` on a free port of this machine while the body runs; yields its endpoint.

    Args:
        binary: the executable.
        folder: where buckets are folders; on a file system with extended attributes.
        options: of the folder back end: ``ONE_AT_A_TIME``.

    Raises RuntimeError, with the end of the server's log, where it does not listen in time.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    environment = {
        **os.environ,
        "ROOT_ACCESS_KEY": CREDENTIALS["AWS_ACCESS_KEY_ID"],
        "ROOT_SECRET_KEY": CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
    }
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [str(binary), "--port", f"127.0.0.1:{port}", "--quiet", "posix", *options, str(folder)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait(process, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()  # what it has confirmed is in the folder
        process.wait()


def make_bucket(endpoint: str, bucket: str) -> None:
    """Creates the bucket unless it is there, with the credentials of the environment."""
    import boto3
    from botocore.config import Config

    config = Config(s3={"addressing_style": "path"})
    client = boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
    try:
        client.create_bucket(Bucket=bucket)
    except (client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
        pass
    finally:
        client.close()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    ends = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > ends:
                text = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"versitygw does not listen on port {port}:\n{text}") from None
            time.sleep(0.02)
