"""Tar files: where each member lies. Nothing is unpacked."""

import math
import os
import re
import tarfile

import numpy as np

# How gzip, bzip2, xz and zstd begin.
COMPRESSED = re.compile(rb"\x1f\x8b|BZh[1-9]1AY&SY|\xfd7zXZ|\x28\xb5\x2f\xfd")
# In a tar file a header comes before each member, and both are filled up to blocks of this size. A
# block of zeros ends it.
BLOCK = tarfile.BLOCKSIZE
END = bytes(BLOCK)
HEADER = np.dtype({
    "names": ["name", "owner", "after size", "date", "checksum", "kind", "magic", "device",
              "prefix"],
    "formats": ["S100", "S24", "S1", "S12", "S8", "S1", "S8", "S16", "S1"],
    "offsets": [0, 100, 135, 136, 148, 156, 257, 329, 345], "itemsize": BLOCK})
# An entry of an extended header that only dates the next member. The number is its own length.
DATE = re.compile(rb"(\d\d) [acm]time=[\d.]+\n")


class ArchiveError(ValueError):
    """Its text says what is wrong with the archive as a whole."""


def list_members(file):
    """(name, offset, bytes) of each file in an open tar file, in their order; 0 bytes for what is
    no plain file, such as a link. Raises ArchiveError, or whatever tarfile meets in a broken one,
    after giving what comes before the fault."""
    if COMPRESSED.match(os.pread(file.fileno(), 16, 0)):
        raise ArchiveError("compressed shard, to be unpacked first")
    try:
        return list_plain(file)
    except ValueError:
        return list_any(file)


def list_plain(file) -> list[tuple[str, int, int]]:
    """list_members() of an archive as most programs write them, twenty times as fast as tarfile.
    Raises ValueError at anything unusual."""
    members, headers, places = [], [], []
    # position: of the next header in the file; begin: of the buffer's first byte; start: of the
    # header in the buffer.
    position = begin = 0
    buffer = dates = b""
    while True:
        start = position - begin
        # Three blocks are needed: an extended header, its entries, and the header after it.
        if start + 3 * BLOCK > len(buffer):
            begin, start = position, 0
            buffer = os.pread(file.fileno(), 32 * BLOCK, position)
        header = buffer[start:start + BLOCK]
        if header == END:
            break
        if header[156:157] == b"x":
            extended = buffer[start:start + 2 * BLOCK]
            # Most often the dates are those of the member before.
            if extended != dates:
                headers.append(header)
                places.append((position, check_dates(extended)))
                dates = extended
            header = buffer[start + 2 * BLOCK:start + 3 * BLOCK]
            position += 2 * BLOCK
            if header[156:157] == b"x":
                raise ValueError("two extended headers in a row")
        size = int(header[124:135], 8)
        if size < 0:
            raise ValueError("a header that leads backwards")
        position += BLOCK
        headers.append(header)
        places.append((position, size))
        position += math.ceil(size / BLOCK) * BLOCK
        # Checked together, since each by itself would take as long as all the rest.
        if len(headers) > 1000:
            members += check_headers(headers, places)
            headers, places = [], []
    if os.pread(file.fileno(), 1 << 20, position).strip(b"\0"):
        raise ValueError("something after the end")
    return members + check_headers(headers, places)


def check_dates(extended: bytes) -> int:
    """The bytes of an extended header that only dates the next member, or ValueError."""
    size = int(extended[124:135], 8)
    for entry in extended[BLOCK:BLOCK + size].splitlines(keepends=True):
        date = DATE.fullmatch(entry)
        if date is None or int(date[1]) != len(entry):
            raise ValueError("an extended header that says something else")
    if not 0 < size <= BLOCK:
        raise ValueError("an extended header of an unusual size")
    return size


def check_headers(headers: list[bytes], places: list[tuple]) -> list[tuple[str, int, int]]:
    """(name, offset, bytes) of the files that these headers describe. Raises ValueError if tarfile
    could read anything else in one of them."""
    blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
    fields = blocks.view(HEADER).ravel()
    names = b"\0".join(fields["name"].tolist()).decode("utf-8", "surrogateescape").split("\0")
    kinds = fields["kind"].tolist()
    # A checksum is the sum of all bytes, its own being counted as spaces.
    others = blocks.sum(axis=1, dtype=np.int32) - blocks[:, 148:156].sum(axis=1, dtype=np.int32)
    checksums = [b"%06o\0 " % (total + 8 * ord(" ")) for total in others.tolist()]
    # A long name begins at the prefix, where GNU tar's backups have a date.
    is_plain = (((fields["after size"] == b"") | (fields["after size"] == b" "))
                & ((fields["prefix"] == b"") | (fields["magic"] == b"ustar  ")))
    # Files, empty files, folders, dates, and folders in GNU tar's backups.
    known = {(b"0", True), (b"0", False), (b"5", False), (b"x", True), (b"D", True)}
    if (not is_plain.all() or fields["checksum"].tolist() != checksums
            or len(names) != len(headers)
            or not known.issuperset(zip(kinds, [size > 0 for _, size in places]))):
        raise ValueError("an unusual header")
    # Nobody needs these numbers, but tarfile refuses a header where one is not octal.
    for field, width in (("owner", 8), ("date", 12), ("device", 8)):
        for numbers in set(fields[field].tolist()):
            for start in range(0, len(numbers), width):
                # One that begins so is in base 256, as are those of large user ids.
                if numbers[start] not in (0x80, 0xFF):
                    int(numbers[start:start + width].partition(b"\0")[0].strip() or b"0", 8)
    return [(name, *place) for name, kind, place in zip(names, kinds, places) if kind == b"0"]


def list_any(file):
    """list_members() of any tar file, by tarfile. Raises an error at the first fault."""
    length = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            # Else tarfile keeps every header in memory.
            tar.members = []
            # A sparse member is shorter in the shard than the size that it states.
            sparse = member.issparse()
            if not sparse and member.size > length - member.offset_data:
                raise tarfile.ReadError("a member ends after the file")
            # A negative size leads tarfile backwards, where it would go round for ever.
            if tar.offset <= member.offset:
                raise tarfile.ReadError("the next header comes before this one")
            if member.type not in (tarfile.DIRTYPE, b"D"):
                yield member.name, member.offset_data, (
                    member.size if member.isreg() and not sparse else 0)
        # tarfile ends without an error at a header that it cannot read.
        rest = os.pread(file.fileno(), 1 << 20, tar.offset)
        if not rest.startswith(END):
            raise tarfile.ReadError("no end of archive")
        if rest.strip(b"\0"):
            raise ArchiveError("a second archive in the shard")
