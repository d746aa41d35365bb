"""What is wanted of kernels on a GPU beside what `cuda.py` found, as far as it found it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["lines_of", "wanted"]

Found = Mapping[str, Sequence[Mapping[str, Any]]]
"""By part, what its tasks found."""
Wanted = dict[str, Any]
"""{"what": text, "found": number, "wanted": the least of it}."""


def wanted(parts: Found) -> list[Wanted]:
    """Each figure that could be judged."""
    return [
        {"what": what, "found": round(found, 4), "wanted": least}
        for judge in (_memory, _products, _models)
        for what, found, least in judge(parts)
    ]


def lines_of(parts: Found) -> list[str]:
    """The same for people."""
    return [
        f"{'ok ' if one['found'] >= one['wanted'] else 'LOW'}  {one['what']}: {one['found']:.2f}, "
        f"wanted {one['wanted']:.2f}"
        for one in wanted(parts)
    ]


def _rows(parts: Found, part: str) -> Iterator[Mapping[str, Any]]:
    for each in parts.get(part, ()):
        yield from (row for row in each.get("rows", ()) if "problem" not in row)


def _memory(parts: Found) -> Iterator[tuple[str, float, float]]:
    """One row of W4A16 waits for its weights."""
    for row in _rows(parts, "times"):
        if row.get("rows") == 1 and "of_bandwidth" in row:
            yield f"{row['region']}, 1 row, of a copy's bandwidth", row["of_bandwidth"], 0.85


def _products(parts: Found) -> Iterator[tuple[str, float, float]]:
    """How many times as long a peer takes."""
    fastest: dict[tuple[str, tuple[int, ...]], float] = {}
    for peer in _rows(parts, "peers"):
        key = (peer["peer"], tuple(peer["shape"]))
        fastest[key] = min(peer["microseconds"], fastest.get(key, peer["microseconds"]))
    for row in _rows(parts, "times"):
        if "region" not in row:
            continue
        anchor, sizes = _anchor_of(row["region"])
        shape = (row["rows"], sizes["K"], sizes["N"])
        for peer_name, least in _peers_of(anchor, row["rows"]):
            if (peer_name, shape) in fastest:
                ratio = fastest[peer_name, shape] / row["microseconds"]
                yield f"{row['region']}, {row['rows']} rows, {peer_name} / ours", ratio, least


def _anchor_of(name: str) -> tuple[str, dict[str, int]]:
    """Of QMatMulW4A16_K4096_N4096_G128_f16."""
    anchor, *rest = name.split("_")
    sizes = [part for part in rest if part[0].isupper() and part[1:].isdigit()]
    return anchor, {part[0]: int(part[1:]) for part in sizes}


def _peers_of(anchor: str, rows: int) -> list[tuple[str, float]]:
    if anchor == "QMatMulW8A8":
        return [("cuBLASLt int8", 0.9)]
    if anchor == "QMatMulFp8":
        return [("cuBLASLt fp8", 0.9), ("cuBLASLt fp8 fast", 0.9)]
    if rows == 1:
        return []
    return [("cuBLAS fp16", 3.3 if rows == 16 else 1.0)]


def _models(parts: Found) -> Iterator[tuple[str, float, float]]:
    """Ours beside the best of ONNX Runtime's own."""
    times: dict[str, dict[str, float]] = {}
    for row in _rows(parts, "models"):
        times.setdefault(row["model"], {})[row["contender"]] = row["milliseconds"]
    for model, found in times.items():
        peers = [time for name, time in found.items() if name in ("ORT FP16", "ORT MatMulNBits")]
        for name, time in found.items():
            if peers and not name.startswith("ORT"):
                yield f"{model}, the faster of ORT's / {name}", min(peers) / time, 1.0
