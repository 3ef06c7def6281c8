"""What does not pass is told within seconds, with what to do about it in the words of its protocol."""

from __future__ import annotations

import json
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import ConfigError, DataError, EarwitnessError, ExitCode, ShardError, run_command
from data import retry, storage
from data.location import Location
from data.retry import Limits
from tests import refusals
from tests.shards import clip, shard
from tools import index, inspect, stage
from tools.arguments import named_data

CONTENT = bytes(range(256)) * 9000
KEYS = {"AWS_ACCESS_KEY_ID": "some", "AWS_SECRET_ACCESS_KEY": "body", "AWS_DEFAULT_REGION": "us-east-1"}
SECONDS = 20
"""Far less than the 100 for which is tried what may pass."""
SET_REGION = "region_name: eu-west-9"


@pytest.fixture(scope="module")
def server() -> Iterator[refusals.Server]:
    with refusals.serve(CONTENT) as server:
        yield server


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("data.location._open", {})


def in_bucket(server: refusals.Server, name: str, **options: object) -> Location:
    return Location(f"s3://{name}/a.tar", json.dumps({"endpoint_url": server.url, **options}))


def on_web(server: refusals.Server, name: str) -> Location:
    return Location(f"{server.url}/{name}/a.tar")


def refused(place: Location, what: str) -> str:
    """The message with which a read is refused, or a look at the size."""
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        storage.read(place, 0, 9) if what == "read" else storage.stat(place)
    assert time.monotonic() - began < SECONDS
    return str(caught.value)


BY_S3 = {
    "moved": ("region, eu-west-9, moved.s3.eu-west-9.example.com", SET_REGION, "AWS_DEFAULT_REGION"),
    "elsewhere": ("another region, and the server does not say in which", "region_name: REGION"),
    "bare": ("another region, eu-west-9", SET_REGION),
    "malformed": ("another region, ap-south-9", "region_name: ap-south-9"),
    "expecting": ("another region, eu-west-9", SET_REGION),
    "opted": ("another region, me-south-9", "region_name: me-south-9"),
    "denied": ("access denied (403 AccessDenied)", "requester_pays: true", "anon: true"),
    "public": ("access denied (403 InvalidAccessKeyId)", "{anon: true}"),
    "unsigned": ("access denied (403 SignatureDoesNotMatch)", "AWS_ACCESS_KEY_ID"),
    "skewed": ("clock", "2026-01-01T00:00:00Z", "timedatectl"),
    "late": ("clock is 60 minutes behind the server's",),
    "customer": ("SSE-C", "--sse-c-key"),
    "kms": ("its key in KMS may not be used", "is disabled", "must enable it"),
    "decrypt": ("its key in KMS may not be used", "allow kms:Decrypt"),
    "argument": ("it was refused (400 InvalidArgument: That is no argument)",),
    "unimplemented": ("does not know how to do that (501 NotImplemented",),
    "method": ("does not know how to do that (405 MethodNotAllowed",),
    "legal": ("it was refused (451 UnavailableForLegalReasons: No)",),
}


@pytest.mark.parametrize("name", BY_S3)
def test_a_refusal_by_s3_says_why_and_what_to_do_also_to_a_look_that_has_no_body(
    server: refusals.Server, name: str
) -> None:
    for what in ("read", "look"):
        said = refused(in_bucket(server, name), what)
        assert all(words in said for words in BY_S3[name]), said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("archived", ("archived (GLACIER)", "--bucket archived --key a.tar --restore-request 'Days=30'")),
        ("tiered", ("archived (ARCHIVE_ACCESS)", "--restore-request '{}'")),
    ],
)
def test_what_is_archived_must_be_restored_and_the_command_is_told(
    server: refusals.Server, name: str, words: tuple[str, ...]
) -> None:
    assert storage.stat(in_bucket(server, name)).size == len(CONTENT)
    said = refused(in_bucket(server, name), "read")
    assert all(one in said for one in words), said


def test_a_list_that_is_refused_says_why(server: refusals.Server) -> None:
    place = Location("s3://moved/*.tar", in_bucket(server, "moved").options)
    with pytest.raises(DataError, match=SET_REGION):
        storage.glob(place)


def test_without_keys_a_public_bucket_is_told_of(
    server: refusals.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    for what in ("read", "look"):
        assert "{anon: true}" in refused(in_bucket(server, "plain"), what)
        assert "only what is public" in refused(in_bucket(server, "denied", anon=True), what)
    assert storage.read(in_bucket(server, "plain", anon=True), 5, 9) == CONTENT[5:9]


BY_WEB = {
    "unauthorised": ("access denied (401)", "~/.netrc"),
    "forbidden": ("access denied (403)", "trust_env: true"),
    "gone": ("it does not exist",),
    "bad": ("it was refused (400)",),
    "method": ("(405)",),
    "loop": ("redirects without end",),
    "bare": ("redirects to nowhere, as for what is in another region, eu-west-9 (301)",),
    "unimplemented": ("(501)",),
}


@pytest.mark.parametrize("name", BY_WEB)
def test_a_refusal_by_a_web_server_does_not_speak_of_buckets(server: refusals.Server, name: str) -> None:
    for what in ("read", "look"):
        said = refused(on_web(server, name), what)
        assert all(words in said for words in BY_WEB[name]), said
        assert "AWS" not in said and "bucket" not in said


def test_what_is_busy_is_tried_again_whatever_its_status(
    server: refusals.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "LIMITS", Limits(give_up=0.3, longest_pause=0.1))
    for place in (
        in_bucket(server, "busy"),
        in_bucket(server, "throttled"),
        on_web(server, "many"),
        Location("http://127.0.0.1:9/a.tar"),
    ):
        with pytest.raises(ShardError, match="s without progress"):
            storage.read(place, 0, 9)


@pytest.mark.parametrize("name", ["gated", "private"])
def test_a_hub_that_wants_an_account_says_so(
    server: refusals.Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    place = Location(f"hf://datasets/owner/{name}/a.tar", json.dumps({"endpoint": server.url}))
    for what in ("read", "look"):
        said = refused(place, what)
        assert "access denied (40" in said and "HF_TOKEN" in said and "AWS" not in said


def test_a_password_for_a_web_server_comes_from_netrc(
    server: refusals.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter2\n", encoding="utf-8")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    options = json.dumps({"client_kwargs": {"trust_env": True}})
    place = Location(f"{server.url}/netrc/a.tar", options)
    assert storage.stat(place).size == len(CONTENT) and storage.read(place, 3, 9) == CONTENT[3:9]
    assert "~/.netrc" in refused(Location(place.url), "look")


def test_a_certificate_that_is_not_valid_is_told_at_once(tmp_path: Path) -> None:
    made = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=elsewhere -keyout key -out certificate"
    subprocess.run(made.split(), cwd=tmp_path, check=True, capture_output=True)
    with refusals.serve(CONTENT) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        secure = server.url.replace("http", "https")
        for place, variable in (
            (Location(f"{secure}/plain/a.tar"), "SSL_CERT_FILE"),
            (Location("s3://plain/a.tar", json.dumps({"endpoint_url": secure})), "AWS_CA_BUNDLE"),
        ):
            for what in ("read", "look"):
                said = refused(place, what)
                assert "certificate is not valid" in said and variable in said, said


def test_https_to_a_port_that_speaks_http_is_told_at_once(server: refusals.Server) -> None:
    secure = server.url.replace("http", "https")
    for place in (
        Location(f"{secure}/plain/a.tar"),
        Location("s3://plain/a.tar", json.dumps({"endpoint_url": secure})),
    ):
        assert "does not speak TLS" in refused(place, "look")


def test_a_server_without_ranges_is_told_of_and_what_it_has_is_copied_by_stage(
    server: refusals.Server, tmp_path: Path
) -> None:
    for number, place in enumerate((in_bucket(server, "whole"), on_web(server, "whole"))):
        assert "this server gives no ranges" in refused(place, "read")
        took: list[bytes] = []
        storage.pour(place, len(CONTENT), took.append)
        assert b"".join(took) == CONTENT
        folder = tmp_path / str(number)
        options = json.dumps({"endpoint_url": server.url}) if number == 0 else None
        stage.stage([place.url], folder, storage_options=options)
        assert (folder / "a.tar").read_bytes() == CONTENT


def test_what_fails_while_a_whole_object_is_taken_is_not_the_storages_fault(server: refusals.Server) -> None:
    def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        storage.pour(on_web(server, "whole"), len(CONTENT), full)


def test_a_page_instead_of_a_shard_and_one_without_a_size_are_named(server: refusals.Server) -> None:
    assert "a web page (Sign in): did its download need a sign-in?" in refused(on_web(server, "page"), "read")
    assert "does not say how large it is" in refused(on_web(server, "endless"), "look")


def test_what_no_installed_package_opens_is_refused(server: refusals.Server) -> None:
    for url in ("nosuch://a/b.tar", "gs://a/b.tar"):
        with pytest.raises(EarwitnessError, match=r"not known|[Ii]nstall"):
            storage.stat(Location(url))


@pytest.fixture(scope="module")
def of_a_shard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[refusals.Server]:
    """A server of a real shard."""
    file = shard(tmp_path_factory.mktemp("served") / "a.tar", clip("one") + clip("two"))
    with refusals.serve(file.read_bytes()) as server:
        yield server


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("moved", SET_REGION),
        ("payer", "requester_pays: true"),
        ("public", "anon: true"),
        ("whole", "this server gives no ranges"),
        ("archived", "restore-object"),
    ],
)
def test_commands_end_with_three_and_one_paragraph(
    of_a_shard: refusals.Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    words: str,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", of_a_shard.url)
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: index.index([f"s3://{name}/a.tar"], index_dir=str(tmp_path)))
    assert time.monotonic() - began < SECONDS
    said = capsys.readouterr().err
    assert ended.value.code == ExitCode.DATA and words in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(("name", "option"), [("payer", "requester_pays"), ("anonymous", "anon")])
@pytest.mark.parametrize("file", ["a.tar", "*.tar"])
def test_storage_options_on_a_command_line_reach_every_request(
    of_a_shard: refusals.Server, tmp_path: Path, name: str, option: str, file: str
) -> None:
    options = json.dumps({option: True, "endpoint_url": of_a_shard.url})
    index.index([f"s3://{name}/{file}"], index_dir=str(tmp_path / "index"), storage_options=options)
    inspect.inspect([f"s3://{name}/{file}"], index_dir=str(tmp_path / "none"), storage_options=options)
    stage.stage([f"s3://{name}/{file}"], tmp_path / "copies", storage_options=options)
    assert (tmp_path / "copies/a.tar").read_bytes() == of_a_shard.content


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (["a.tar"], "anon", "is a mapping in JSON or YAML"),
        (["a.tar"], "{anon: [", "is a mapping in JSON or YAML"),
        (["a.tar"], "{secret: x}", "secrets do not belong"),
        (["a.tar"], "{headers: {Authorization: Bearer x}}", "Authorization: secrets do not belong"),
        (["mine.yaml"], "{anon: true}", "a config says it itself"),
    ],
)
def test_storage_options_that_cannot_be_are_refused(names: list[str], options: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        named_data(names, storage_options=options)


@pytest.mark.parametrize("options", [{"region": "eu-west-9"}, {"client_kwargs": {"region": "eu-west-9"}}])
def test_an_option_that_there_is_none_of_comes_with_those_that_there_are(options: dict[str, object]) -> None:
    """Not with advice on credentials, which it has nothing to do with."""
    said = refused(Location("s3://plain/a.tar", json.dumps(options)), "size")
    assert "storage_options: there is no option 'region'" in said
    assert "client_kwargs: {region_name: ..." in said and "credentials" not in said
