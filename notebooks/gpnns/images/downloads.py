"""Downloads that go on where they stopped, and archives unpacked as a whole or not at all."""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.client
import lzma
import os
import shutil
import ssl
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import gpnns_utils as gu

TRIES, PAUSE, TIMEOUT = 4, 3.0, 60.0  # downloads: attempts without progress, seconds between them, seconds of silence


def download(urls: Sequence[str], path: Path, size: int | None = None, md5: str | None = None) -> Path:
    """Fetch a file from the first of `urls` that answers, and return `path`.

    A broken download goes on where it stopped, also after a restart; `path` appears when the file is complete and its
    size and checksum are right. ConnectionError when no URL answers, ValueError for wrong bytes, OSError without room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    failures, attempt = 0, 0
    while True:
        url, before = urls[attempt % len(urls)], get_file_size(partial)
        try:
            receive_rest(url, partial, path.name, size)
            break
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            final = isinstance(error, urllib.error.HTTPError) and error.code < 500  # not there: do not ask again
            attempt, failures = attempt + 1, failures + 1 if get_file_size(partial) <= before else 0
            if failures >= (len(urls) if final else max(TRIES, len(urls))):
                reason = getattr(error, "reason", None) or error
                kept = f"{get_file_size(partial):,} bytes are kept in {partial}. Run again when online to go on there"
                or_else = f"or get the file elsewhere and save it as {path}"
                raise ConnectionError(f"could not download {url} ({reason}); {kept}, {or_else}") from error
            time.sleep(PAUSE if failures and not final else 0)
        except OSError as error:
            if error.errno is None:
                raise  # it says what is wrong already
            raise gu.disk_error(path, error, f"{get_file_size(partial):,} bytes are kept in {partial}") from error
    try:
        check_file(partial, size, md5)
    except ValueError:
        remove_partial(partial)  # going on from wrong bytes would never become right
        raise
    os.replace(partial, path)
    remove_partial(partial)
    return path


def receive_rest(url: str, partial: Path, label: str, size: int | None) -> None:
    """One attempt: append to `partial` what is still missing, or begin again when the server cannot go on."""
    have, tag = get_file_size(partial), partial.with_name(partial.name + ".tag")
    request = urllib.request.Request(url, headers={"User-Agent": "gpnns"})
    if have and tag.exists():  # only of the very same file; without a tag only size and checksum could tell
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", tag.read_text())
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing from there on: all is here already, or it is not the same file
            raise
        if (error.headers.get("Content-Range") or "").rpartition("/")[2] != str(have):
            remove_partial(partial)
            raise ConnectionError("the file on the server is another one now") from error
        return
    with response:
        if getattr(response, "status", None) != 206:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else size
        if size and total != size:
            changed = "the file was changed. Look at its home page"
            raise ValueError(f"{url} has {total:,} bytes, expected {size:,}: {changed}")
        free = shutil.disk_usage(partial.parent).free
        if total and total - have > free:
            needs = f"{label} needs {(total - have) / 1e6:,.0f} MB and {partial.parent} has {free / 1e6:,.0f} MB free"
            raise OSError(f"{needs}; set GPNNS_DATA to a larger disk")
        if not have:
            tag.unlink(missing_ok=True)
            mark = response.headers.get("ETag") or response.headers.get("Last-Modified") or "W/"
            if not mark.startswith("W/"):  # a weak tag does not promise the same bytes
                tag.write_text(mark)
        progress = gu.Progress((total or 0) // 2**20, f"downloading {label}", "MB", done=have // 2**20)
        with open(partial, "ab" if have else "wb") as file:
            while block := response.read(2**20):
                file.write(block)
                have += len(block)
                progress.update(have // 2**20)
    if total and have < total:
        raise ConnectionError(f"the connection broke after {have:,} of {total:,} bytes")


def check_file(path: Path, size: int | None, md5: str | None) -> None:
    """Raise ValueError when a file has not the size or checksum that the table gives."""
    if size and get_file_size(path) != size:
        raise ValueError(f"{path} has {get_file_size(path):,} bytes, expected {size:,}; remove it and get it again")
    if md5:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            raise ValueError(f"{path} has the checksum {found}, expected {md5}; remove it and get it again")


def get_file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def remove_partial(partial: Path) -> None:
    """Remove a partial download and what is known about it."""
    for path in (partial, partial.with_name(partial.name + ".tag")):
        path.unlink(missing_ok=True)


# RuntimeError: a zip that asks for a password
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)


def is_archive(name: str) -> bool:
    return name.endswith((".tar", ".tar.gz", ".tgz", ".zip"))


def unpack_archive(archive: Path, target: Path, nested: bool = False) -> None:
    """Unpack a tar or zip archive so that `target` appears at once and complete; `nested`: the tars in it too.

    Where the archive holds something named like `target` at its top, that becomes `target`, else all of it. With nothing
    written: ValueError for an archive that is damaged, or leads outside its folder; OSError where the disk has no room.
    """
    if not archive.is_file():
        raise FileNotFoundError(f"there is no archive {archive}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir()
        extract_members(archive, partial)
        for inner in sorted(partial.glob("*.tar")) if nested else []:  # one per class: ImageNet's training set
            unpack_archive(inner, inner.with_suffix(""))
            inner.unlink()
        inner = partial / target.name
        os.replace(inner if inner.exists() else partial, target)
    except DAMAGED as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{archive} cannot be unpacked ({reason}); remove it and get it again") from error
    except OSError as error:
        raise gu.disk_error(target, error, f"nothing of {archive.name} was kept") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def extract_members(archive: Path, folder: Path) -> None:
    """Unpack every file of a tar or zip archive. The standard library refuses links that lead outside the folder."""
    progress = gu.Progress(max(get_file_size(archive) // 2**20, 1), f"unpacking {archive.name}", "MB")
    with open(archive, "rb") as raw:
        if zipfile.is_zipfile(raw):
            packed = zipfile.ZipFile(raw)
            size = sum(member.file_size for member in packed.infolist())
            members = ((one, one.filename, stat.S_ISLNK(one.external_attr >> 16)) for one in packed.infolist())
        else:
            raw.seek(0)
            packed = tarfile.open(fileobj=raw, mode="r:*")  # noqa: SIM115 - closed below
            size = get_file_size(archive)  # pictures become hardly smaller when they are packed
            may_link = packed.extraction_filter = getattr(tarfile, "data_filter", None)  # since Python 3.11.4
            members = ((one, one.name, not (may_link or one.isfile() or one.isdir())) for one in packed)
        with packed:
            check_room(folder, size)
            for member, name, is_link in members:
                check_member(archive, name, is_link)
                packed.extract(member, folder)
                progress.update(raw.tell() // 2**20)


def check_room(folder: Path, size: int) -> None:
    """OSError where the disk of `folder` has no room for `size` bytes."""
    free = shutil.disk_usage(folder).free
    if size > free:
        needs = f"it unpacks to {size / 1e6:,.0f} MB, and {folder.parent} has {free / 1e6:,.0f} MB free"
        raise OSError(errno.ENOSPC, needs)


def check_member(archive: Path, name: str, is_link: bool) -> None:
    """ValueError for a path outside the folder, which would be unpacked under another name, and for a link that cannot be."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if is_link or parts.is_absolute() or PureWindowsPath(name).drive or ".." in parts.parts or "\0" in name:
        kind = "a link or device" if is_link else "a path outside its folder"
        raise ValueError(f"{archive} holds {name!r}, {kind}: it is not unpacked. Get it from the data set's home page")
