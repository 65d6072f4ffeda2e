"""The page asks nothing of a network, escapes everything, and holds what the report has."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser

from diffaccel.eval.reports.html import html_report
from tests.eval.report_sample import NASTY, PROMPT, sample_page, sample_table

VOID = {"meta", "link", "img", "br"}


class Elements(HTMLParser):
    """Every start tag with its attributes, all text outside of script and style, and whether all tags are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def test_nothing_is_asked_of_a_network() -> None:
    page = sample_page().replace('xmlns="http://www.w3.org/2000/svg"', "").replace("http-equiv", "")
    assert "http" not in page
    addresses = [
        value for _, attrs in Elements(page).tags for key, value in attrs.items() if key in ("src", "href", "srcset")
    ]
    assert addresses
    assert all(address and address.startswith("data:") for address in addresses)
    without_pictures = re.sub(r"base64,[^\"]+", "", page)
    assert not re.search(r"@import|url\(|//", without_pictures)


def test_only_our_script_may_run() -> None:
    page = sample_page()
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    assert not [key for _, attrs in Elements(page).tags for key in attrs if key.startswith("on")]


def test_everything_is_escaped_and_nothing_lost() -> None:
    page = sample_page()
    parsed = Elements(page)
    assert parsed.open == []
    assert "<script>alert" not in page
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert f"0: {PROMPT}" in parsed.text
    assert NASTY in parsed.text
    assert "Footnote with 5% & <i>." in parsed.text
    assert "Report <1>" in parsed.text
    assert not {"b>", "i"} & {tag for tag, _ in parsed.tags}


def test_numbers_for_sorting_and_the_baseline() -> None:
    tags = Elements(sample_page()).tags
    numbers = [attrs["data-v"] for tag, attrs in tags if tag == "td" and "data-v" in attrs]
    assert {"0.41", "Infinity", "-0.0001"} <= set(numbers)
    assert [attrs.get("class") for tag, attrs in tags if tag == "tr"] == [None, "baseline", None, None]


def test_manifest_is_folded() -> None:
    parsed = Elements(sample_page())
    assert [attrs for tag, attrs in parsed.tags if tag == "details"] == [{}, {}]
    assert '"unet": "77<31"' in parsed.text
    assert "<details>" not in html_report("t", [replace(sample_table(), manifest={})])
