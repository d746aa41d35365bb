"""What an ELF64 file needs from outside: undefined symbols and versioned libraries."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

__all__ = ["glibc_version", "undefined_symbols"]

_SYMBOL_TABLES = {2, 11}  # SHT_SYMTAB, SHT_DYNSYM
_VERSION_NEEDS = 0x6FFFFFFE  # SHT_GNU_verneed
_UNDEFINED = 0  # SHN_UNDEF


@dataclasses.dataclass(frozen=True)
class _Section:
    kind: int
    data: bytes
    link: int


def undefined_symbols(image: bytes) -> set[str]:
    """The symbols an object or library expects others to define."""
    sections = _sections(image)
    names = set()
    for section in sections:
        if section.kind not in _SYMBOL_TABLES:
            continue
        strings = sections[section.link].data
        for name, _, _, index, _, _ in struct.iter_unpack("<IBBHQQ", section.data):
            if name and index == _UNDEFINED:
                names.add(_string(strings, name))
    return names


def glibc_version(image: bytes) -> str:
    """The oldest glibc that can load a library, such as "2.17"; "2.0" if it asks for none."""
    wanted = [
        version.removeprefix("GLIBC_")
        for version in _needed_versions(image)
        if version.startswith("GLIBC_") and version[6:7].isdigit()
    ]
    return max(wanted, key=lambda v: [int(part) for part in v.split(".")], default="2.0")


def _needed_versions(image: bytes) -> Iterator[str]:
    sections = _sections(image)
    for section in sections:
        if section.kind != _VERSION_NEEDS:
            continue
        strings, need, following = sections[section.link].data, 0, 1
        while following:
            _, count, _, first, following = struct.unpack_from("<HHIII", section.data, need)
            entry = need + first
            for _ in range(count):
                _, _, _, name, step = struct.unpack_from("<IHHII", section.data, entry)
                yield _string(strings, name)
                entry += step
            need += following


def _sections(image: bytes) -> list[_Section]:
    (table,) = struct.unpack_from("<Q", image, 0x28)
    size, count = struct.unpack_from("<HH", image, 0x3A)
    sections = []
    for i in range(count):
        _, kind, _, _, offset, length, link, _, _, _ = struct.unpack_from(
            "<IIQQQQIIQQ", image, table + i * size
        )
        sections.append(_Section(kind, image[offset : offset + length], link))
    return sections


def _string(strings: bytes, start: int) -> str:
    return strings[start : strings.index(b"\0", start)].decode()
