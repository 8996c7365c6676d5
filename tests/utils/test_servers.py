"""Sizes and addresses in options of commands that serve others."""

import pytest

from samf.utils.servers import is_loopback, open_port, parse_size


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


def test_a_port_that_is_taken_and_a_host_that_is_elsewhere_are_refused():
    with open_port("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1:{port}: can't listen there .* Choose another"):
            open_port("127.0.0.1", port)
    with pytest.raises(ValueError, match="can't listen there"):
        open_port("192.0.2.1", 0)
