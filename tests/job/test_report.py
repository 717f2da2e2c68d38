"""The HTML page of a run: whole, self-contained, escaped, and right for small runs too."""

from __future__ import annotations

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvtier.errors import KVTierError, MissingExtra
from kvtier.job.report import check_writable, write_report
from tests.job.results import Result, make_result, with_tiers, without_returning_turns

pytest.importorskip("matplotlib")
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks nesting and unique ids; collects attributes that load something, and the text outside of style."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._attributes(attrs)
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                assert value not in self.ids, f"id {value} twice"
                self.ids.add(str(value))
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.loads.append(str(value))


def write(result: Result, folder: Path) -> Page:
    path = folder / "report.html"
    write_report(result, path)
    return Page(path)


def test_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    page = write(make_result(), tmp_path)
    assert page.source.startswith("<!DOCTYPE html>")
    assert page.tags.count("svg") == 3
    assert "script" not in page.tags
    assert all(value.startswith("#") and value[1:] in page.ids for value in page.loads)
    assert not re.search(r"@import|url\((?!#)", page.source)
    assert all(reference in page.ids for reference in re.findall(r"url\(#([^)]+)\)", page.source))


def test_page_has_every_figure_of_the_result(tmp_path: Path) -> None:
    result = make_result()
    page = write(result, tmp_path)
    shown, _, raw = page.text.partition("The whole result as JSON")
    for figure in ("256.0 MiB", "64.0 MiB", "25%", "Failed: 1 of 2 checks", "Not met: no page was refused", "13.5 times"):
        assert figure in shown
    for row in result["turns"][2:]:
        for key in ("ttft_restored_ms", "ttft_lossless_ms", "ttft_recomputed_ms"):
            assert f"{row[key]:,.0f} ms" in shown
    for times in result["ttft_ms"].values():
        assert not isinstance(times, dict) or f"median {times['p50']:,.0f} ms, p95 {times['p95']:,.0f} ms" in shown
    for tier in result["tiers"].values():
        assert all(f"{tier[key]:,}" in shown for key in ("pages", "pages_in", "pages_served", "hit_tokens"))
        assert all(f"{number:,} {reason}" in shown for key in ("evicted", "refused") for reason, number in tier[key].items())
    for link in result["links"].values():
        assert f"{link['gb_per_s']:.3f} GB/s" in shown
        assert f"{link['bytes'] / 2**20:.1f} MiB" in shown
    for sample in result["timeline"]:
        assert all(f"{pages:,}" in shown for pages in sample["pages"].values())
    for measure in ("0.00197 nats", "0.00241 nats", "97.80%", "8.957", "+0.243%", "1,279", "283 pages: 229 in time"):
        assert measure in shown
    for word in ("Abacus 9", "3.0 GiB", "3.11.7", "2.9", "Linux 6", "720.0 KiB", "lru", "refused: 3 checksum"):
        assert word in shown
    assert "183 s" in raw
    assert json.loads(raw[raw.index("{") : raw.rindex("}") + 1]) == result


def test_figures_are_named_for_those_who_cannot_see_them(tmp_path: Path) -> None:
    page = write(make_result(), tmp_path)
    labels = re.findall(r'<svg[^>]*role="img"[^>]*aria-labelledby="([^"]+)"', page.source)
    assert len(labels) == 3
    assert all(reference in page.ids for label in labels for reference in label.split())


def test_figures_take_their_colours_from_the_page(tmp_path: Path) -> None:
    source = write(make_result(), tmp_path).source
    for svg in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000", "#ffffff"}


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "$title ${json} $x^2$", "a & b \"quoted\" 'too'", "日本語"])
def test_hostile_names_are_text(name: str, tmp_path: Path) -> None:
    result = make_result()
    result["model"]["name"] = result["machine"]["cpu"] = result["checks"][0]["detail"] = name
    for key in ("tiers", "links"):
        result[key] = {f"{name}{old}": value for old, value in result[key].items()}
    result["tiers"]["device"] = next(iter(result["tiers"].values()))
    for sample in result["timeline"]:
        sample["pages"] = dict.fromkeys(result["tiers"], 5)
    page = write(result, tmp_path)
    assert "script" not in page.tags
    assert page.text.count(name) >= 8


@pytest.mark.parametrize("names", [("device",), ("device", "host"), ("device", "disk")])
def test_fewer_tiers_make_a_page(names: tuple[str, ...], tmp_path: Path) -> None:
    page = write(with_tiers(*names), tmp_path)
    assert page.tags.count("svg") == (2 if len(with_tiers(*names)["links"]) == 0 else 3)


def test_a_run_without_returning_turns_makes_a_page(tmp_path: Path) -> None:
    page = write(without_returning_turns(), tmp_path)
    shown = page.text.partition("The whole result as JSON")[0]
    assert "No session returned" in shown
    assert "nan" not in shown


def test_many_turns_stay_one_figure(tmp_path: Path) -> None:
    result = make_result()
    result["turns"] += [dict(result["turns"][2]) for _ in range(120)]
    assert write(result, tmp_path).tags.count("svg") == 3


def test_an_unusable_path_is_said_before_the_run_and_nothing_is_left(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "report.html", tmp_path):
        with pytest.raises(KVTierError, match="cannot be written"):
            check_writable(path)
    check_writable(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_check_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("earlier")
    check_writable(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "earlier"


def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        return None if name == "matplotlib" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(MissingExtra, match=r"pip install 'kvtier\[report\]'"):
        check_writable(tmp_path / "report.html")
