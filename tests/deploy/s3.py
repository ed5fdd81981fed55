"""An S3-compatible store: moto's server as a process of its own on loopback."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3

from tests.deploy.postgres import free_port

SECONDS_TO_START = 60


class S3:
    """A store that answers at ``url``; ``environment`` is what its clients are started with."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.environment = {
            "MLFLOW_S3_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip

    def client(self) -> Any:
        """boto3's client of it."""
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.url, **keys)

    def objects(self, bucket: str) -> dict[str, int]:
        """Keys of a bucket with their sizes."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {one["Key"]: one["Size"] for page in pages for one in page.get("Contents", ())}


@contextmanager
def s3(*buckets: str) -> Iterator[S3]:
    """A running store with these buckets."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        made = S3(f"http://127.0.0.1:{port}")
        _make(made, buckets, process)
        yield made
    finally:
        process.terminate()
        process.wait(30)


def _make(made: S3, buckets: tuple[str, ...], process: subprocess.Popen[bytes]) -> None:
    from botocore.exceptions import EndpointConnectionError

    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            made.client().list_buckets()
            break
        except EndpointConnectionError:
            assert process.poll() is None, "the store has ended"
            assert time.monotonic() < deadline, "the store does not start"
            time.sleep(0.1)
    for bucket in buckets:
        made.client().create_bucket(Bucket=bucket)
