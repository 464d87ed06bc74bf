import pytest
from hypothesis import given
from hypothesis import strategies as st
from steadyhelm.config.load import load_run_file
from steadyhelm.config.s3 import DEADLINE_S, TIMEOUT_S, S3Address
from steadyhelm.errors import ConfigError


def test_a_bare_uri_leaves_everything_to_the_standard_chain():
    address = S3Address.parse("s3://my-bucket/team/runs/")
    assert address == S3Address(bucket="my-bucket", prefix="team/runs")
    assert (address.endpoint, address.region, address.path_style) == ("", "", False)
    assert (address.timeout_s, address.deadline_s) == (TIMEOUT_S, DEADLINE_S)
    assert S3Address.parse("s3://my-bucket").prefix == ""


def test_an_endpoint_brings_path_style_unless_told_otherwise():
    uri = "s3://my-bucket/runs?endpoint=https://minio.example:9000"
    assert S3Address.parse(uri).path_style
    assert not S3Address.parse(uri + "&path_style=0").path_style
    assert S3Address.parse("s3://my-bucket/runs?path_style=1").path_style


@given(
    prefix=st.sampled_from(["", "runs", "a/b.c/d-e"]),
    endpoint=st.sampled_from(["", "http://127.0.0.1:9000", "https://s3.example/base"]),
    region=st.sampled_from(["", "eu-central-1"]),
    path_style=st.booleans(),
    timeout_s=st.sampled_from([0.5, TIMEOUT_S, 90.0]),
    deadline_s=st.sampled_from([2.0, DEADLINE_S]),
)
def test_an_address_written_and_read_again_is_the_same(**parts):
    address = S3Address(bucket="my-bucket", **parts)
    assert S3Address.parse(str(address)) == address


def test_defaults_are_not_written_out():
    uri = "s3://my-bucket/runs?endpoint=http://127.0.0.1:9000"
    assert str(S3Address.parse(f"{uri}&path_style=1&timeout_s={TIMEOUT_S}&deadline_s={DEADLINE_S}")) == uri


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3:///runs", "names no bucket"),
        ("s3://b", "names no bucket"),
        ("s3://my-bucket/runs#x", "names no bucket"),
        ("s3://my-bucket/a//b", "empty part"),
        ("s3://my-bucket/../b", "empty part, '.' or '..'"),
        ("s3://my-bucket/runs?endpont=x", "unknown setting 'endpont'"),
        ("s3://my-bucket/runs?endpoint=minio:9000", "like https://host:port"),
        ("s3://my-bucket/runs?endpoint=http://[::1", "like https://host:port"),
        ("s3://my-bucket/runs?endpoint=http://minio:99999", "like https://host:port"),
        ("s3://my-bucket/runs?path_style=yes", "give 0 or 1"),
        ("s3://my-bucket/runs?timeout_s=0", "timeout_s is '0'"),
        ("s3://my-bucket/runs?deadline_s=soon", "deadline_s is 'soon'"),
        ("s3://my-bucket/runs?deadline_s=inf", "deadline_s is 'inf'"),
    ],
)
def test_a_wrong_uri_says_what_would_be_right(uri, message):
    with pytest.raises(ConfigError, match=message):
        S3Address.parse(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAEXAMPLE:hunter2hunter2@my-bucket/runs",
        "s3://my-bucket/runs?endpoint=https://AKIAEXAMPLE:hunter2hunter2@minio.example",
        "s3://my-bucket/runs?access_key=AKIAEXAMPLE&secret=hunter2hunter2",
    ],
)
def test_credentials_in_a_uri_are_refused_and_never_repeated(uri):
    with pytest.raises(ConfigError) as raised:
        S3Address.parse(uri)
    assert "hunter2" not in str(raised.value)
    assert "AKIA" not in str(raised.value)


def test_a_run_file_with_a_wrong_store_names_line_and_field(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "name: a\nmodel: {path: m}\ndata: {train: task.py:pairs}\nschedule: {iterations: 1}\n"
        'store: {uri: "s3://my-bucket/runs?endpont=x"}\n'
    )
    with pytest.raises(ConfigError, match=r"run\.yaml:5: store\.uri has the unknown setting 'endpont'"):
        load_run_file(file)
