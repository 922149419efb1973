"""Hostfiles: what is read, and what each mistake is answered with."""

from __future__ import annotations

import pytest

from configs.errors import ConfigError
from launcher.hosts import read_hostfile


def test_hosts_come_in_order_with_their_slots_without_comments(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# rack 1\nb2 slots=8\n\na1   slots=4  # half of it\n10.0.0.3 slots=1\n")
    assert list(read_hostfile(path).items()) == [("b2", 8), ("a1", 4), ("10.0.0.3", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slot=8\n", ":1: found `a slot=8`, expected `NAME slots=N`"),
        ("a slots=1\nb\n", ":2: found `b`"),
        ("a slots=0\n", ":1: found"),
        ("-oProxyCommand=x slots=1\n", ":1: found"),
        ("a slots=1\na slots=2\n", ":2: host a for the second time"),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(path)
    assert message in str(caught.value)


def test_a_missing_hostfile_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ConfigError, match="no-such-file: cannot be read"):
        read_hostfile(tmp_path / "no-such-file")
