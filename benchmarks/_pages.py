"""Rendered text in a page of the documents, between two marks."""

from pathlib import Path


def fill(page: Path, begin: str, rendered: str, end: str) -> None:
    """Replace what stands between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    for mark in (begin, end):
        assert mark in text, f"{page} has no {mark.strip()}"
    page.write_text(text.partition(begin)[0] + begin + rendered + end + text.partition(end)[2], encoding="utf-8")
