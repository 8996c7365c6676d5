"""Sizes and addresses in options of commands that serve others."""

import pytest

from samf.utils.servers import is_loopback, parse_size


def test_loopback_addresses():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.0.1", "localhost", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.5", "example.org", "")))


@pytest.mark.parametrize(
    ("text", "size"), [("1gb", 2**30), (" 500 MB", 500 * 2**20), ("2.5G", 5 * 2**29), ("900", 900), ("8b", 8)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "gb", "0", "0.2", "-1gb", "1 parsec", "nan", "1..5gb"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="500mb or 1gb"):
        parse_size(text)
