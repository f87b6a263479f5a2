"""Reading what a listener serves."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

__all__ = ["fetched", "samples"]


def fetched(url: str) -> tuple[int, str]:
    """Return the status and the body of what is at ``url``, an error or not; it takes 10 seconds at most."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def samples(text: str) -> Iterator[Sample]:
    """Return what a page of metrics holds."""
    for family in text_string_to_metric_families(text):
        yield from family.samples
