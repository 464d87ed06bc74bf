"""What every test shares: offline, one thread, the CPU; a small model built once."""

import os

os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "DO_NOT_TRACK": "1",
    }
)

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from steadyhelm.cli import end_at_once
from steadyhelm.testing.s3_server import CREDENTIALS, ONE_AT_A_TIME, make_bucket, s3_server

from tests.programs import fetched

# How long an example takes says how busy the machine is.
settings.register_profile("steadyhelm", deadline=None)
settings.load_profile("steadyhelm")

SESSION = pytest.StashKey[pytest.Session]()
ROOT = Path(__file__).resolve().parents[1]
WORKLOAD = ROOT / "workloads" / "r1_reward"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keeps what tells how it ended."""
    session.config.stash[SESSION] = session


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends a process that had Ray or torch in it, once all is reported and closed, with the session's exit status."""
    session = config.stash.get(SESSION, None)
    if session is None or not {"ray", "torch"} & sys.modules.keys() or hasattr(config, "workerinput"):
        return
    config.get_terminal_writer().flush()
    end_at_once(int(session.exitstatus))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits workload's tiny Qwen2.5-VL, random weights of seed 0, as a model folder."""
    sys.path.insert(0, str(WORKLOAD))
    import tiny_model as factory

    folder = tmp_path_factory.mktemp("model") / "tiny"
    factory.build(folder, 0)
    return folder


@pytest.fixture(scope="session")
def versitygw() -> Path:
    """The S3 server's executable, built once per machine."""
    return fetched("versitygw")


@pytest.fixture(scope="session")
def s3_endpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server: somebody else's where STEADYHELM_TEST_S3_ENDPOINT names one, otherwise one of our own."""
    given = os.environ.get("STEADYHELM_TEST_S3_ENDPOINT")
    if given:
        yield given
        return
    binary = request.getfixturevalue("versitygw")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        with s3_server(binary, tmp_path_factory.mktemp("s3") / "buckets", *ONE_AT_A_TIME) as endpoint:
            yield endpoint


@pytest.fixture(scope="session")
def s3_bucket(s3_endpoint: str) -> str:
    """A bucket there, whose name STEADYHELM_TEST_S3_BUCKET gives."""
    bucket = os.environ.get("STEADYHELM_TEST_S3_BUCKET", "steadyhelm-test")
    make_bucket(s3_endpoint, bucket)
    return bucket


@pytest.fixture
def s3_uri(s3_endpoint: str, s3_bucket: str) -> str:
    """An empty store of this test's own."""
    return f"s3://{s3_bucket}/{uuid.uuid4().hex}?endpoint={s3_endpoint}&timeout_s=30&deadline_s=180"
