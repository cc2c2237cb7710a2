"""`fedrounds data get`, from a server on 127.0.0.1: what is fetched, checked, refused and said."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fedrounds.deployments.cli import main
from fedrounds.fl_components.data import downloads
from fedrounds.fl_components.data.downloads import download, statuses
from fedrounds.fl_components.data.published import PUBLISHED, PublishedData, PublishedFile
from fedrounds.fl_components.errors import ConfigError, DataError, Unreachable
from tests.support import ROOT

REAL = dict(PUBLISHED)
IMAGES, LABELS = b"the images" * 100, b"the labels"


class Mirror(ThreadingHTTPServer):
    """A web server: `answers` has the body for each path, or a function that answers by itself."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.answers: dict[str, bytes | Callable[[BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        answer = self.server.answers.get(self.path)
        if answer is None:
            self.send_error(404)
        elif callable(answer):
            answer(self)
        else:
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    with Mirror() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("FEDROUNDS_DATA_URL", server.url)
        yield server
        server.shutdown()
        thread.join()


def published(name: str, content: bytes) -> PublishedFile:
    return PublishedFile(name, hashlib.sha256(content).hexdigest(), len(content))


@pytest.fixture(autouse=True)
def folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files of a small MNIST go; and a working folder in which there are none."""
    small = PublishedData(
        ("images", "labels"),
        "http://127.0.0.1:9/mnist",  # where nothing listens
        (published("images.gz", IMAGES), published("labels.gz", LABELS)),
    )
    monkeypatch.setitem(PUBLISHED, "mnist", small)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "FEDROUNDS_DATA_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FEDROUNDS_DATA", str(tmp_path / "public"))
    working = tmp_path / "project" / "work"
    working.mkdir(parents=True)
    monkeypatch.chdir(working)
    return tmp_path / "public" / "mnist"


def serve_mnist(mirror: Mirror) -> None:
    mirror.answers = {"/mnist/images.gz": gzip.compress(IMAGES), "/mnist/labels.gz": gzip.compress(LABELS)}


def visible(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name != ".lock")


def test_the_files_come_whole_and_under_their_names(mirror: Mirror, folder: Path) -> None:
    serve_mnist(mirror)
    said: list[str] = []
    found = download("mnist", say=said.append)
    assert found == {"name": "mnist", "folder": str(folder), "downloaded": ["images", "labels"], "present": []}
    assert visible(folder) == ["images.gz", "labels.gz"]
    assert gzip.decompress((folder / "images.gz").read_bytes()) == IMAGES
    assert said == [f"downloading {mirror.url}/mnist/{name}.gz" for name in ("images", "labels")]


def test_what_is_there_is_not_fetched_again(mirror: Mirror, folder: Path) -> None:
    serve_mnist(mirror)
    download("mnist")
    (folder / "labels.gz").unlink()
    (folder / "labels").write_bytes(LABELS)  # without .gz is as good
    mirror.asked.clear()
    assert download("mnist") == {
        "name": "mnist",
        "folder": str(folder),
        "downloaded": [],
        "present": ["images", "labels"],
    }
    assert mirror.asked == []
    (folder / "images.gz").unlink()
    assert download("mnist")["downloaded"] == ["images"]
    assert mirror.asked == ["/mnist/images.gz"]


def test_a_folder_that_cannot_be_written_to_will_do_when_it_is_complete(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(parents=True)
    (folder / "images").write_bytes(IMAGES)
    (folder / "labels").write_bytes(LABELS)
    monkeypatch.setattr(downloads, "_locked", None)  # would write there
    assert download("mnist")["present"] == ["images", "labels"]
    assert not (folder / ".lock").exists()


def test_files_elsewhere_are_completed_there(mirror: Mirror, folder: Path, home: Path) -> None:
    """A training reads the first folder that has any of the files, and refuses one that has only some."""
    serve_mnist(mirror)
    home.mkdir(mode=0o700)
    at_home = home / "data" / "mnist"
    at_home.mkdir(parents=True)
    (at_home / "labels").write_bytes(LABELS)
    assert download("mnist")["folder"] == str(at_home)
    assert visible(at_home) == ["images.gz", "labels"]
    assert not folder.exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (gzip.compress(b"x" * len(IMAGES)), f"its sha256 is {hashlib.sha256(b'x' * len(IMAGES)).hexdigest()}"),
        (gzip.compress(IMAGES[:-1]), "its sha256 is"),
        (gzip.compress(IMAGES + b"more"), f"it has more than {len(IMAGES):,} bytes"),
        (gzip.compress(IMAGES)[:-9], "it cannot be uncompressed"),
        (b"<html>not found</html>", "its sha256 is"),
        (b"", "its sha256 is"),
    ],
    ids=["other content", "too short", "too long", "cut off", "a page", "nothing"],
)
def test_other_content_is_refused_and_removed(mirror: Mirror, folder: Path, body: bytes, words: str) -> None:
    serve_mnist(mirror)
    mirror.answers["/mnist/images.gz"] = body
    with pytest.raises(DataError) as caught:
        download("mnist")
    assert caught.value.message.startswith(f"{mirror.url}/mnist/images.gz is not the published file: {words}")
    assert caught.value.hint is not None and "removed" in caught.value.hint
    assert visible(folder) == []


def test_a_mirror_that_serves_the_file_uncompressed_will_do(mirror: Mirror, folder: Path) -> None:
    serve_mnist(mirror)
    mirror.answers["/mnist/images.gz"] = IMAGES
    download("mnist")
    assert visible(folder) == ["images", "labels.gz"]


def test_a_file_that_is_there_with_other_content_is_named_and_left_alone(mirror: Mirror, folder: Path) -> None:
    serve_mnist(mirror)
    folder.mkdir(parents=True)
    (folder / "labels").write_bytes(b"my labels")
    with pytest.raises(DataError, match=f"{folder}/labels is not the published file: its sha256 is") as caught:
        download("mnist")
    assert caught.value.hint == "move it away, then run the command again"
    assert (folder / "labels").read_bytes() == b"my labels"
    assert mirror.asked == []


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(bytes(1 << 16))
    except OSError:  # the reader has left
        pass


def announced(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("content-length", str(1 << 40))
    handler.end_headers()


def cut_short(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "100")
    handler.end_headers()
    handler.wfile.write(b"ten bytes.")


def no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")


def silent(handler: BaseHTTPRequestHandler) -> None:
    handler.rfile.read(1)  # until the reader has left


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (endless, "the answer is longer than the 66,536 bytes that the file may have"),
        (announced, "the answer is longer than the 66,536 bytes that the file may have"),
        (cut_short, "the connection ended after 10 of 100 bytes"),
        (no_http, "BadStatusLine"),
        (silent, "no answer within 0.2 s"),
        (None, "the server answers 404 Not Found"),
    ],
)
def test_a_server_that_does_not_answer_as_it_should_is_unreachable(
    mirror: Mirror,
    folder: Path,
    answer: Callable[[BaseHTTPRequestHandler], None] | None,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(downloads, "TIMEOUT_S", 0.2 if answer is silent else 10.0)
    if answer is not None:
        mirror.answers["/mnist/images.gz"] = answer
    with pytest.raises(Unreachable) as caught:
        download("mnist")
    assert caught.value.message.startswith(f"{mirror.url}/mnist/images.gz cannot be downloaded: {words}")
    assert caught.value.hint == f"put images and labels into {folder}, as they are or with .gz after the name"
    assert visible(folder) == []


@pytest.mark.parametrize("host", [f"{'a' * 80}.example", "[::1]:9", "127.0.0.1:9"])
def test_a_host_that_cannot_be_reached(host: str) -> None:
    with pytest.raises(Unreachable, match="cannot be downloaded"):
        download("mnist", f"http://{host}")


def test_without_a_network_the_command_says_which_files_go_where(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "get", "mnist", "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "unreachable"
    assert "http://127.0.0.1:9/mnist/images.gz cannot be downloaded: Connection refused" in error["message"]
    assert error["hint"] == f"put images and labels into {folder}, as they are or with .gz after the name"


def test_the_option_comes_before_the_variable(mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_mnist(mirror)
    monkeypatch.setenv("FEDROUNDS_DATA_URL", "http://127.0.0.1:9")
    assert main(["data", "get", "mnist", "--url", f"{mirror.url}/"]) == 0
    assert mirror.asked == ["/mnist/images.gz", "/mnist/labels.gz"]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host",
        "file:///etc",
        "host/folder",
        "http://",
        "http://host:port",
        "http://host:99999",
        "https://user:secret@host",
        "http://host/?token=secret",
        "http://host/#part",
        "http://höst/",
        "http://host/a folder",
        "http://host/\nx",
        "http://[::1",
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        download("mnist", url)
    assert "secret" not in f"{caught.value.message}{caught.value.hint}"
    assert caught.value.hint is not None and "URL/mnist/FILE" in caught.value.hint


def test_the_proxy_of_the_environment_is_used_but_not_to_this_machine(
    mirror: Mirror, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_mnist(mirror)
    mirror.answers |= {f"http://mirror.example{path}": body for path, body in mirror.answers.items()}
    monkeypatch.setenv("http_proxy", mirror.url)
    download("mnist", "http://mirror.example")
    assert mirror.asked == ["http://mirror.example/mnist/images.gz", "http://mirror.example/mnist/labels.gz"]
    for file in folder.glob("*.gz"):
        file.unlink()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert download("mnist", mirror.url)["downloaded"] == ["images", "labels"]


def test_what_a_killed_download_left_is_removed(mirror: Mirror, folder: Path) -> None:
    serve_mnist(mirror)
    folder.mkdir(parents=True)
    (folder / f".images.gz.{'0' * 32}").write_bytes(b"half of it")
    download("mnist")
    assert visible(folder) == ["images.gz", "labels.gz"]


def test_two_downloads_at_once_fetch_once(mirror: Mirror, folder: Path) -> None:
    serve_mnist(mirror)
    found: list[list[str]] = []
    threads = [threading.Thread(target=lambda: found.append(download("mnist")["downloaded"])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(len, found)) == [0, 0, 2]
    assert len(mirror.asked) == 2


def test_a_folder_that_cannot_be_made_is_named(mirror: Mirror, folder: Path) -> None:
    folder.parent.write_bytes(b"a file where the folder should be")
    with pytest.raises(DataError, match=f"cannot be written to {folder}: Not a directory|File exists") as caught:
        download("mnist")
    assert caught.value.hint is not None and "FEDROUNDS_DATA" in caught.value.hint


class TestAnArchive:
    @pytest.fixture(autouse=True)
    def emnist(self, folder: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> Path:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for name, data in (("images", IMAGES), ("labels", LABELS), ("../outside", b"no")):
                archive.writestr(f"gzip/{name}.gz", gzip.compress(data))
        mirror.answers = {"/emnist/gzip.zip": content.getvalue()}
        small = PublishedData(
            ("images", "labels"),
            "http://127.0.0.1:9/emnist",
            (published("gzip.zip", content.getvalue()),),
            archive_folder="gzip",
        )
        monkeypatch.setitem(PUBLISHED, "emnist", small)
        return folder.with_name("emnist")

    def test_the_files_are_taken_out_of_it(self, emnist: Path, mirror: Mirror) -> None:
        assert download("emnist")["downloaded"] == ["images", "labels"]
        assert visible(emnist) == ["images.gz", "labels.gz"]
        assert gzip.decompress((emnist / "labels.gz").read_bytes()) == LABELS
        assert download("emnist")["downloaded"] == []
        assert len(mirror.asked) == 1

    def test_another_archive_is_refused_before_it_is_opened(self, emnist: Path, mirror: Mirror) -> None:
        mirror.answers = {"/emnist/gzip.zip": b"PK\3\4"}
        with pytest.raises(DataError, match="is not the published file"):
            download("emnist")
        assert visible(emnist) == []


@pytest.mark.parametrize(
    ("name", "words"), [("femnist", "LEAF publishes a script"), ("nope", "there is no public data set 'nope'")]
)
def test_what_nobody_publishes_cannot_be_had(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "get", name]) == 2
    assert words in capsys.readouterr().err


def test_data_that_need_no_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "get", "digits"]) == 0
    assert capsys.readouterr().out == "digits needs no files: comes with scikit-learn.\n"


def test_the_list_says_what_is_where(mirror: Mirror, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mnist = {each["name"]: each for each in statuses()}["mnist"]
    assert (mnist["missing"], mnist["folder"]) == (["images", "labels"], str(folder))
    serve_mnist(mirror)
    download("mnist")
    capsys.readouterr()
    assert main(["data", "--json"]) == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)["data"]}
    assert list(found) == list(PUBLISHED)
    assert (found["mnist"]["missing"], found["mnist"]["folder"]) == ([], str(folder))
    assert main(["data"]) == 0
    rows = capsys.readouterr().out
    assert "2 of 2" in rows and "get it with: fedrounds data get shakespeare" in rows


@pytest.mark.parametrize("name", ["mnist", "shakespeare"])
def test_the_pinned_checksums_are_those_of_the_real_files(name: str) -> None:
    """Where they are on this machine."""
    folder = ROOT.parent / "shared" / "data" / name
    if not folder.is_dir():
        pytest.skip(f"the files of {name} are not in {folder}")
    for each in REAL[name].downloads:
        file = downloads.find_file(folder, each.name.removesuffix(".gz"))
        assert file is not None and downloads._difference(file, each) is None


def test_a_free_port_is_not_a_server() -> None:
    """Port 9 of this machine, which the tests above take for one where nothing listens."""
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", 9)) != 0
