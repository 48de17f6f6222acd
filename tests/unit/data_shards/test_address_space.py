"""An address space that duckdb does not fit in (ulimit -v) is refused before duckdb crashes in it."""

import resource

import pytest

from data_shards import address_space
from data_shards.address_space import bytes_of, check_address_space, free_address_space
from data_shards.errors import ConfigError, DataError
from data_shards.options import load_prepare_settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1500MB", 1_500_000_000), ("1.5 GB", 1_500_000_000), ("1GiB", 1 << 30), ("64 KiB", 1 << 16)],
)
def test_sizes_are_duckdbs(text: str, expected: int) -> None:
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["1..2GB", ".GB", "12", "1500mb", "-1GB"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="memory_limit"):
        load_prepare_settings("tables", [f"memory_limit={text}"])


@pytest.mark.parametrize(("free", "fix"), [(1_000, "set memory_limit=600MB, or"), (420, "fix: raise that")])
def test_what_does_not_fit_is_refused_with_what_does(
    monkeypatch: pytest.MonkeyPatch, free: int, fix: str
) -> None:
    monkeypatch.setattr(address_space, "free_address_space", lambda: free * 1_000_000)
    with pytest.raises(DataError, match=rf"needs 1,900 MB.*may take {free:,} MB more.*{fix}"):
        check_address_space("1500MB")
    monkeypatch.setattr(address_space, "free_address_space", lambda: 1_900_000_000)
    check_address_space("1500MB")


def test_what_is_free_is_the_limit_less_what_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 46, 1 << 46))
    free = free_address_space()
    assert free is not None and (1 << 45) < free < (1 << 46)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert free_address_space() is None
