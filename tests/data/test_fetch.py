"""The download, its checks and the unpacking, against a server on this machine; bad archives; faults."""
import hashlib
import io
import os
import socket
import stat
import subprocess
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from covidsev import core
from covidsev.core import (ArchiveError, ChecksumError, ConfigError, DataMissingError, RunLockedError, data_root,
                           read_json, run_lock, sha256_bytes)
from covidsev.data import sources
from covidsev.data.sources import FolderDigest, compare_content, download, fetch, folder_digest, get_card, get_data, safe_extract

FILES = {f"part {k}/{name}": bytes([k]) * size for k in (1, 2) for name, size in (("a.png", 300), ("ü b.png", 70_000))}


def zip_bytes(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


GOOD = zip_bytes({**{f"Inf-Net-abc/Dataset/{name}": content for name, content in FILES.items()}, "Inf-Net-abc/x.py": b""})
PAGES = {"/other.zip": zip_bytes({f"x/Dataset/{name}": content[1:] for name, content in FILES.items()}),
         "/damaged.zip": GOOD.replace(b"\x01" * 300, b"\x03" * 300), "/short.zip": GOOD[:-200], "/empty.zip": b"",
         "/page.zip": b"<html><body>rate limited</body></html>", "/elsewhere.zip": zip_bytes({"a/b.png": b"1"})}
WHOLE = ["Dataset", "SOURCE.json"]  # what a finished fetch leaves


class Handler(BaseHTTPRequestHandler):
    """Answers by path; counts the requests of each path."""

    counts: dict = {}

    def do_GET(self):
        count = self.counts[self.path] = self.counts.get(self.path, 0) + 1
        if self.path == "/busy.zip" and count < 3:
            return self.send_error(503)
        if self.path == "/missing.zip":
            return self.send_error(404)
        body = PAGES.get(self.path, GOOD)
        self.send_response(200)
        if self.path not in ("/short.zip", "/endless.zip"):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        broken = self.path == "/always-breaks.zip" or (self.path == "/breaks-once.zip" and count == 1)
        try:
            self.wfile.write(body[:len(body) // 2] if broken else body)
            while self.path == "/endless.zip":
                self.wfile.write(bytes(1 << 20))
        except ConnectionError:
            self.counts["/hung up"] = 1

    def log_message(self, *arguments):
        pass


@pytest.fixture
def site(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    Handler.counts = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def small(tmp_path):
    """(page -> card of a small data set with the digests of FILES)."""
    for name, content in FILES.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(content)
    content = {folder.name: folder_digest(folder) for folder in sorted((tmp_path / "source").iterdir())}
    return lambda url, **changes: replace(get_card("covid-semiseg"), name="small", content=content, files=[
        {"url": url, "folder": "Dataset", "inside": "Dataset", **changes}])


def leftovers(home):
    return sorted(path.name for path in home.iterdir() if path.name != ".lock")


# --- fetching

@pytest.mark.parametrize("page, requests", [("good.zip", 1), ("breaks-once.zip", 2), ("busy.zip", 3)])
def test_fetch_also_after_a_broken_connection_or_a_busy_server(site, small, tmp_path, page, requests):
    home = fetch(small(f"{site}/{page}"), tmp_path / "data root", echo=str)
    assert home == tmp_path / "data root" / "small" and leftovers(home) == WHOLE
    folder = home / "Dataset"
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == FILES
    assert Handler.counts[f"/{page}"] == requests
    note = read_json(home / "SOURCE.json")
    assert note["files"] == {"Dataset": sha256_bytes(GOOD)} and "NON-COMMERCIAL" in note["licence"]
    assert str(tmp_path) not in str(note)


@pytest.mark.parametrize("page, error, words", [
    ("missing.zip", ChecksumError, ["HTTP status 404"]), ("empty.zip", ChecksumError, ["an empty file"]),
    ("page.zip", ChecksumError, ["looks like an HTML", "expected: a zip or tar file"]),
    ("always-breaks.zip", ChecksumError, ["then the connection was lost"]),
    ("short.zip", ChecksumError, ["not a whole archive"]), ("elsewhere.zip", ArchiveError, ["no folder Dataset"]),
    ("other.zip", ChecksumError, ["part 1: expected 2 files", "got 2 files"]), ("damaged.zip", ArchiveError, ["CRC"]),
    ("endless.zip", ChecksumError, ["larger than it should be"])])
@pytest.mark.parametrize("old_copy", [True, False])
def test_failures_say_what_they_found_and_keep_the_old_copy(site, small, tmp_path, page, error, words, old_copy):
    if old_copy:
        fetch(small(f"{site}/good.zip"), tmp_path, echo=str)
    card = small(f"{site}/{page}", most_mb=3)
    with pytest.raises(error) as caught:
        fetch(card, tmp_path, force=True, echo=str)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert leftovers(tmp_path / "small") == (WHOLE if old_copy else [])
    assert compare_content(tmp_path / "small" / "Dataset", card, present_only=not old_copy) == []
    assert Handler.counts[f"/{page}"] == (3 if page == "always-breaks.zip" else 1)


def test_a_mirror_replaces_the_address_and_the_licence_comes_first(site, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sources.cards(), "small", card := small("https://example.org/x.zip"))
    shown = []
    home = get_data("small", tmp_path, url=f"{site}/good.zip", echo=shown.append)
    assert leftovers(home) == WHOLE and "NON-COMMERCIAL" in shown[0] and card.citation in shown[0]
    with pytest.raises(ConfigError, match="only for a set that is one archive"):
        get_data("covid19-ct-seg", tmp_path, url=f"{site}/good.zip", echo=str)


def test_offline_names_the_way_by_hand(small, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as closed:  # a port on which nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x.zip"
    with pytest.raises(DataMissingError, match=f"(?s)could not reach.*offline.*by hand: download {url}.*COVIDSEV_DATA"):
        fetch(small(url), tmp_path, echo=str)
    assert leftovers(tmp_path / "small") == []


def test_a_whole_copy_is_not_fetched_again_and_a_damaged_one_is(site, small, tmp_path):
    card, copy = small(f"{site}/good.zip"), tmp_path / "small" / "Dataset"
    for fetches in (1, 1, 2):
        if fetches == 2:
            (copy / "part 1" / "a.png").write_bytes(b"damaged")
        fetch(card, tmp_path, echo=str)
        assert Handler.counts["/good.zip"] == fetches and compare_content(copy, card) == []


def test_archives_with_hashes_are_fetched_one_by_one_and_a_broken_off_fetch_goes_on(site, small, tmp_path):
    files = [{"url": f"{site}/{page}.zip", "folder": page, "sha256": sha256_bytes(content)}
             for page, content in (("good", GOOD), ("elsewhere", PAGES["/elsewhere.zip"]))]
    card = replace(small("x"), content={}, files=[files[0], {**files[1], "sha256": "0" * 64}])
    with pytest.raises(ChecksumError, match=f"(?s){files[1]['sha256']}.*expected: sha256 {'0' * 64}"):
        fetch(card, tmp_path, echo=str)
    assert leftovers(tmp_path / "small") == ["SOURCE.json", "good"]
    fetch(replace(card, files=files), tmp_path, echo=str)
    assert leftovers(tmp_path / "small") == ["SOURCE.json", "elsewhere", "good"] and Handler.counts["/good.zip"] == 1


def test_what_a_killed_fetch_left_is_cleaned_and_a_swap_cut_in_half_is_undone(site, small, tmp_path):
    card = small(f"{site}/good.zip")
    folder = fetch(card, tmp_path, echo=str) / "Dataset"
    (tmp_path / "small" / ".fetch").mkdir()
    os.replace(folder, folder.with_name(".Dataset.covidsev.old"))  # killed between the two renames of a swap
    fetch(card, tmp_path, force=True, echo=str)
    assert leftovers(tmp_path / "small") == WHOLE and compare_content(folder, card) == []


def test_the_old_copy_returns_when_the_last_rename_fails(site, small, tmp_path, monkeypatch):
    card, rename = small(f"{site}/good.zip"), os.replace
    folder = fetch(card, tmp_path, echo=str) / "Dataset"

    def failing(source, target):
        if str(source).endswith(".Dataset.covidsev.partial"):
            raise OSError(28, "No space left on device", str(target))
        rename(source, target)

    monkeypatch.setattr(core.os, "replace", failing)
    pytest.raises(OSError, fetch, card, tmp_path, force=True, echo=str).match("No space left.*small/Dataset")
    assert compare_content(folder, card) == [] and leftovers(tmp_path / "small") == WHOLE


def test_nothing_is_asked_for_where_it_could_not_be_written(site, small, tmp_path):
    card = small(f"{site}/good.zip")
    with run_lock(tmp_path / "small"), pytest.raises(RunLockedError, match=str(os.getpid())):
        fetch(card, tmp_path, echo=str)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot write to the folder for the data"):
        fetch(card, tmp_path / "file", echo=str)
    pytest.raises(ConfigError, download, "file:///etc/hostname", tmp_path / "x").match("not an address")
    assert Handler.counts == {}


# --- unpacking

def refused(path, words, **options):
    pytest.raises(ArchiveError, safe_extract, path, path.parent / "target", **options).match(words)


def tar_file(path, *members):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content, fields in members:
            info = tarfile.TarInfo(name)
            for field, value in {"size": len(content), **fields}.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "..\\x", "C:\\x", "C:x", "\\\\host\\x", "a/.."])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_paths_that_leave_the_target_are_refused_before_anything_is_written(tmp_path, name, kind):
    path = tmp_path / f"bad.{kind}"
    if kind == "zip":
        path.write_bytes(zip_bytes({"good": b"good", name: b"bad"}))
    else:
        tar_file(path, ("good", b"good", {}), (name, b"bad", {}))
    refused(path, "(?s)must not be unpacked; nothing was.*leads out")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", [
    {"type": tarfile.SYMTYPE, "linkname": "/etc"}, {"type": tarfile.LNKTYPE, "linkname": "good"},
    {"type": tarfile.CHRTYPE}, {"type": tarfile.FIFOTYPE}, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_refused(tmp_path, kind):
    if isinstance(kind, dict):
        tar_file(tmp_path / "bad", ("good", b"good", {}), ("bad", b"", kind))
    else:
        info = zipfile.ZipInfo("elsewhere/link")
        info.external_attr = (kind | 0o777) << 16
        (tmp_path / "bad").write_bytes(zip_bytes({"Dataset/good": b"good", info: "../.."}))
    refused(tmp_path / "bad", "is a link, a device")
    assert not (tmp_path / "target").exists()


def test_bombs_are_refused_by_what_they_declare(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(3_000_000))
    tar_file(tmp_path / "bomb.tar.gz", ("zeros", bytes(3_000_000), {}))
    for name in ("bomb.zip", "bomb.tar.gz"):
        refused(tmp_path / name, "(?s)unpacks to more than is allowed.*3,000,000 bytes")
    refused(tmp_path / "bomb.zip", "at most 100,000 members, 100 bytes", most=100, ratio=1e6)
    monkeypatch.setattr(sources, "MAX_ARCHIVE_MEMBERS", 50)
    (tmp_path / "many.zip").write_bytes(zip_bytes({str(k): b"" for k in range(51)}))
    tar_file(tmp_path / "many.tar", *((str(k), b"", {}) for k in range(51)))
    for name in ("many.zip", "many.tar"):
        refused(tmp_path / name, "(?s)at least 51 members.*at most 50 members")
    assert not (tmp_path / "target").exists()


def lying() -> bytes:
    """A zip whose headers declare 7 bytes for 100."""
    content = bytearray(zip_bytes({"a.png": b"0123456789" * 10}))
    for mark, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):  # the uncompressed size in both headers
        place = content.index(mark) + offset
        content[place:place + 4] = (7).to_bytes(4, "little")
    return bytes(content)


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"PK\x03\x04 not really", b"\x1f\x8b no", GOOD[:5000],
                                     GOOD.replace(b"\x02" * 100, b"\x02" * 99 + b"\x04", 1), lying()])
def test_damaged_and_lying_archives_are_named(tmp_path, content):
    (tmp_path / "x.zip").write_bytes(content)
    refused(tmp_path / "x.zip", "not a whole zip or tar archive")


def test_the_same_name_twice_is_refused(tmp_path):
    refused(tar_file(tmp_path / "twice.tar", ("a", b"1", {}), ("a", b"2", {})), "is there twice")


# --- digests

def test_digest_is_what_sha256sum_prints(tmp_path):
    for name in ("b", "a", "10", "2"):
        (tmp_path / name).write_bytes(name.encode())
    done = subprocess.run("LC_ALL=C sha256sum -- *", shell=True, cwd=tmp_path, capture_output=True)
    if done.returncode:
        pytest.skip("no sha256sum here")
    assert folder_digest(tmp_path) == FolderDigest(4, 5, hashlib.sha256(done.stdout).hexdigest())


REAL = data_root() and data_root() / "covid-semiseg" / "Dataset"


@pytest.mark.skipif(not REAL or not REAL.is_dir(), reason="no real data")
def test_the_real_files_have_the_digests_of_the_card():
    assert compare_content(REAL, get_card("covid-semiseg")) == []
