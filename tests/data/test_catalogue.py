"""The download, its checks and the unpacking, against a server on this machine; bad archives; faults."""
import io
import os
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covidsev.data import catalogue
from covidsev.data.sources import (CATALOGUE, FolderDigest, compare_content, download, fetch,
                                   folder_digest, get_entry, missing_data_message, safe_extract)
from covidsev.core import (ArchiveError, ChecksumError, ConfigError, DataMissingError, RunLockedError,
                             data_root)
from covidsev.core import read_json, run_lock, sha256_file

FILES = {f"part {k}/{name}": bytes([k]) * size for k in (1, 2) for name,
         size in (("a.png", 300), ("ü b.png", 70_000))}


def zip_bytes(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


GOOD = zip_bytes({f"Inf-Net-abc/Dataset/{name}": content for name, content in FILES.items()}
                 | {"Inf-Net-abc/x.py": b""})
OTHER = zip_bytes({f"x/Dataset/{name}": content[1:] for name, content in FILES.items()})
DAMAGED = GOOD.replace(b"\x01" * 300, b"\x03" * 300)

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
        body = {"/page.zip": b"<html><body>rate limited</body></html>", "/other.zip": OTHER,
                "/damaged.zip": DAMAGED,
                "/short.zip": GOOD[:-200],
                "/empty.zip": b""}.get(self.path, GOOD)
        self.send_response(200)
        if self.path != "/short.zip":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        broken = self.path == "/always-breaks.zip" or (self.path == "/breaks-once.zip" and count == 1)
        self.wfile.write(body[:len(body) // 2] if broken else body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("COVIDSEV_QUIET", "1")
    Handler.counts = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """A small data set in the catalogue, with the digests of FILES."""
    source = tmp_path / "source"
    for name, content in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    content = {folder.name: folder_digest(folder) for folder in sorted(source.iterdir())}
    small = replace(get_entry("covid-semiseg"), name="small", content=content)
    monkeypatch.setitem(CATALOGUE, "small", small)
    return small


def leftovers(home):
    return sorted(path.name for path in home.iterdir() if path.name != ".lock")


# --- fetching ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", ["good.zip", "breaks-once.zip", "busy.zip"])
def test_fetch_also_after_a_broken_connection_or_a_busy_server(site, entry, tmp_path, page):
    shown = []
    folder = fetch("small", tmp_path / "data root", url=f"{site}/{page}", echo=shown.append)
    assert folder == tmp_path / "data root" / "small" / "Dataset"
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == FILES
    assert "NON-COMMERCIAL" in shown[0] and entry.citation in shown[0]
    assert leftovers(folder.parent) == WHOLE
    assert Handler.counts[f"/{page}"] == {"good.zip": 1, "breaks-once.zip": 2, "busy.zip": 3}[page]


def test_source_note_names_the_archive_and_no_place_or_time(site, entry, tmp_path):
    fetch("small", tmp_path, url=f"{site}/good.zip", echo=str)
    note = read_json(tmp_path / "small" / "SOURCE.json")
    (tmp_path / "good.zip").write_bytes(GOOD)
    assert note["archive_sha256"] == sha256_file(tmp_path / "good.zip") and note["licence"] == entry.licence
    assert str(tmp_path) not in str(note)


@pytest.mark.parametrize(("page", "words"), [
    ("missing.zip", ["HTTP status 404"]), ("page.zip", ["looks like an HTML page",
                                                        "expected: a zip or tar file"]),
    ("always-breaks.zip", ["then the connection was lost"]), ("short.zip", ["not a whole archive"]),
    ("empty.zip", ["an empty file"]), ("other.zip", ["part 1: expected 2 files", "got 2 files"])])
@pytest.mark.parametrize("old_copy", [True, False])
def test_failures_say_what_they_found_and_keep_the_old_copy(site, entry, tmp_path, page, words, old_copy):
    if old_copy:
        fetch("small", tmp_path, url=f"{site}/good.zip", echo=str)
    with pytest.raises(ChecksumError) as caught:
        fetch("small", tmp_path, url=f"{site}/{page}", force=True, echo=str)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "removed" in str(caught.value) and page in str(caught.value)
    assert leftovers(tmp_path / "small") == (WHOLE if old_copy else [])
    assert compare_content(tmp_path / "small" / "Dataset", entry, present_only=not old_copy) == []


def test_hash_of_the_archive_is_checked_where_one_is_given(site, entry, tmp_path):
    (tmp_path / "good.zip").write_bytes(GOOD)
    right = sha256_file(tmp_path / "good.zip")
    with pytest.raises(ChecksumError, match=f"(?s){right}.*expected: sha256 {'0' * 64}"):
        fetch("small", tmp_path, url=f"{site}/good.zip", sha256="0" * 64, echo=str)
    assert fetch("small", tmp_path, url=f"{site}/good.zip", sha256=right, echo=str).is_dir()


def test_offline_names_the_way_by_hand(entry, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as closed:  # a port on which nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x.zip"
    with pytest.raises(DataMissingError) as caught:
        fetch("small", tmp_path, url=url, echo=str)
    for words in ("could not reach", "offline", "by hand: download", "COVIDSEV_DATA", entry.url):
        assert words in str(caught.value)
    assert leftovers(tmp_path / "small") == []


def test_a_whole_copy_is_not_fetched_again_and_a_damaged_one_is(site, entry, tmp_path):
    folder = fetch("small", tmp_path, url=f"{site}/good.zip", echo=str)
    fetch("small", tmp_path, url=f"{site}/good.zip", echo=str)
    assert Handler.counts["/good.zip"] == 1
    (folder / "part 1" / "a.png").write_bytes(b"damaged")
    fetch("small", tmp_path, url=f"{site}/good.zip", echo=str)
    assert Handler.counts["/good.zip"] == 2 and compare_content(folder, entry) == []


def test_what_a_killed_fetch_left_is_cleaned_and_a_swap_cut_in_half_is_undone(site, entry, tmp_path):
    folder = fetch("small", tmp_path, url=f"{site}/good.zip", echo=str)
    (tmp_path / "small" / ".fetch-killed").mkdir()
    os.replace(folder, folder.with_name(".Dataset.old"))  # killed between the two renames of a swap
    fetch("small", tmp_path, url=f"{site}/missing.zip", echo=str)
    assert compare_content(folder, entry) == [] and "/missing.zip" not in Handler.counts
    fetch("small", tmp_path, url=f"{site}/good.zip", force=True, echo=str)
    assert leftovers(tmp_path / "small") == WHOLE


def test_the_old_copy_returns_when_the_last_rename_fails(site, entry, tmp_path, monkeypatch):
    folder = fetch("small", tmp_path, url=f"{site}/good.zip", echo=str)
    rename = os.replace

    def failing(source, target):
        if Path(source).name == "content":
            raise OSError(28, "No space left on device", str(target))
        rename(source, target)

    monkeypatch.setattr(catalogue.os, "replace", failing)
    with pytest.raises(OSError, match="No space left"):
        fetch("small", tmp_path, url=f"{site}/good.zip", force=True, echo=str)
    assert compare_content(folder, entry) == [] and leftovers(tmp_path / "small") == WHOLE


def test_a_second_fetch_at_the_same_time_is_refused(entry, tmp_path):
    with run_lock(tmp_path / "small"), pytest.raises(RunLockedError, match=str(os.getpid())):
        fetch("small", tmp_path, url="http://127.0.0.1:9/x.zip", echo=str)


def test_a_place_that_cannot_be_written_is_said_before_the_download(site, entry, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot write to the folder for the data"):
        fetch("small", tmp_path / "file", url=f"{site}/good.zip", echo=str)
    assert Handler.counts == {}


def test_download_refuses_other_schemes(tmp_path):
    with pytest.raises(ConfigError, match="not an address"):
        download("file:///etc/hostname", tmp_path / "x")


def test_a_damaged_download_names_the_address_and_keeps_the_old_copy(site, entry, tmp_path):
    folder = fetch("small", tmp_path, url=f"{site}/good.zip", echo=str)
    with pytest.raises(ArchiveError, match=f"(?s)removed.*{site}/damaged.zip.*CRC"):
        fetch("small", tmp_path, url=f"{site}/damaged.zip", force=True, echo=str)
    assert compare_content(folder, entry) == [] and leftovers(tmp_path / "small") == WHOLE


# --- unpacking --------------------------------------------------------------------------------------------

def tar_file(path, *members):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def tar_info(name, **fields):
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


NAMES = ["../x", "a/../../x", "/etc/x", "..\\x", "C:\\x", "C:x", "\\\\host\\x", "a/.."]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_paths_that_leave_the_target_are_refused_before_anything_is_written(tmp_path, name, kind):
    path = tmp_path / f"bad.{kind}"
    if kind == "zip":
        path.write_bytes(zip_bytes({"good": b"good", name: b"bad"}))
    else:
        tar_file(path, (tar_info("good"), b"good"), (tar_info(name), b"bad"))
    with pytest.raises(ArchiveError, match="must not be unpacked; nothing was"):
        safe_extract(path, tmp_path / "target")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("fields", "words"), [
    ({"type": tarfile.SYMTYPE, "linkname": "/etc"}, "symbolic link"),
                                               ({"type": tarfile.LNKTYPE, "linkname": "good"}, "hard link"),
    ({"type": tarfile.CHRTYPE}, "device"), ({"type": tarfile.FIFOTYPE}, "device or pipe")])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, fields, words):
    path = tar_file(tmp_path / "bad.tar", (tar_info("good"), b"good"), (tar_info("bad", **fields), b""))
    with pytest.raises(ArchiveError, match=words):
        safe_extract(path, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_in_a_zip_are_refused_even_outside_the_wanted_folder(tmp_path, mode):
    info = zipfile.ZipInfo("elsewhere/link")
    info.external_attr = (mode | 0o777) << 16
    (tmp_path / "bad.zip").write_bytes(zip_bytes({"Dataset/good": b"good", info: "../.."}))
    with pytest.raises(ArchiveError, match="symbolic link|device or pipe"):
        safe_extract(tmp_path / "bad.zip", tmp_path / "target", "Dataset")
    assert not (tmp_path / "target").exists()


def test_bombs_are_refused_by_what_they_declare(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(3_000_000))
    tar_file(tmp_path / "bomb.tar.gz", (tar_info("zeros"), bytes(3_000_000)))
    for name in ("bomb.zip", "bomb.tar.gz"):
        with pytest.raises(ArchiveError, match="(?s)unpacks to more than is allowed.*3000000 bytes declared"):
            safe_extract(tmp_path / name, tmp_path / "target")
        assert not (tmp_path / "target").exists()
    with pytest.raises(ArchiveError, match="at most 100 bytes"):
        safe_extract(tmp_path / "bomb.zip", tmp_path / "target", max_bytes=100, max_ratio=1e6)


def test_a_size_that_lies_is_found_by_counting(tmp_path):
    content = bytearray(zip_bytes({"a.png": b"0123456789" * 10}))
    for mark, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):  # the uncompressed size in both headers
        place = content.index(mark) + offset
        content[place:place + 4] = (7).to_bytes(4, "little")
    (tmp_path / "lie.zip").write_bytes(bytes(content))
    with pytest.raises(ArchiveError):
        safe_extract(tmp_path / "lie.zip", tmp_path / "target")
    with pytest.raises(ArchiveError, match="11 bytes or more"):
        catalogue._copy_counted(io.BytesIO(bytes(10**6)), tmp_path / "counted", 10)
    assert (tmp_path / "counted").stat().st_size == 11


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"PK\x03\x04 not really", b"\x1f\x8b no",
                                     GOOD[:5000]])
def test_what_is_no_archive_is_named(tmp_path, content):
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(ArchiveError, match="not a whole zip or tar archive"):
        safe_extract(tmp_path / "x.zip", tmp_path / "target")


def test_a_flipped_byte_is_found(tmp_path):
    damaged = bytearray(GOOD)
    damaged[GOOD.index(b"\x02" * 100) + 50] ^= 1
    (tmp_path / "x.zip").write_bytes(bytes(damaged))
    with pytest.raises(ArchiveError, match="CRC"):
        safe_extract(tmp_path / "x.zip", tmp_path / "target")


def test_the_same_name_twice_a_full_target_and_a_wrong_folder_are_refused(tmp_path):
    tar_file(tmp_path / "twice.tar", (tar_info("a"), b"1"), (tar_info("a"), b"2"))
    with pytest.raises(ArchiveError):
        safe_extract(tmp_path / "twice.tar", tmp_path / "target")
    with pytest.raises(ConfigError, match="not empty"):
        safe_extract(tmp_path / "twice.tar", tmp_path / "target")
    (tmp_path / "good.zip").write_bytes(GOOD)
    with pytest.raises(ArchiveError, match="no folder Data"):
        safe_extract(tmp_path / "good.zip", tmp_path / "other", "Data")


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text("abcü _-", min_size=1, max_size=8), st.binary(max_size=200), min_size=1,
                       max_size=5))
def test_unpacking_gives_back_what_was_packed(tmp_path_factory, members):
    folder = tmp_path_factory.mktemp("round trip")
    (folder / "x.zip").write_bytes(zip_bytes(members))
    assert safe_extract(folder / "x.zip", folder / "out") == len(members)
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == members


# --- the entry --------------------------------------------------------------------------------------------

def test_digest_is_what_sha256sum_prints(tmp_path):
    for name in ("b", "a", "10", "2"):
        (tmp_path / name).write_bytes(name.encode())
    try:
        listing = subprocess.run("LC_ALL=C sha256sum -- *", shell=True, cwd=tmp_path, capture_output=True,
                                 check=True).stdout
    except subprocess.CalledProcessError:
        pytest.skip("no sha256sum here")
    import hashlib
    assert folder_digest(tmp_path) == FolderDigest(4, 5, hashlib.sha256(listing).hexdigest())


def test_unknown_names_get_a_suggestion():
    for function in (get_entry, missing_data_message):
        with pytest.raises(ConfigError, match="covid-semiseg"):
            function("covid-semi-seg")


def test_the_catalogue_loads_nothing_heavy():
    code = ("import sys, covidsev.data.catalogue as c; c.describe(c.get_entry('covid-semiseg')); "
            "print({'torch', 'numpy', 'pandas', 'pooch', 'requests'} & set(sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip() == "set()"


REAL = data_root() and data_root() / "covid-semiseg" / "Dataset"


@pytest.mark.skipif(not REAL or not REAL.is_dir(), reason="no real data")
def test_the_real_files_have_the_digests_of_the_catalogue():
    assert compare_content(REAL, get_entry("covid-semiseg")) == []
