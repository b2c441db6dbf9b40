"""A cluster of a run's own has a token wherever this user's home is, and the user's own is never written over."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raytrain.cluster.token import is_at_hand, made_at_home, token_at_hand
from raytrain.errors import PreflightError

NAMES = ("HOME", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "taken"),
    [
        ({"RAY_AUTH_TOKEN": "secret"}, "none made"),
        ({"RAY_AUTH_TOKEN_PATH": "{tmp}/given"}, "none made"),
        ({"RAY_AUTH_MODE": "disabled", "HOME": "{tmp}"}, "none made"),
        ({"HOME": "{tmp}/old"}, "none made"),
        ({"HOME": "{tmp}"}, "at home"),
        ({"HOME": "/proc"}, "its own"),  # as HOME=/ is for a user who is not root
        ({"HOME": "/nonexistent"}, "its own"),
        ({"HOME": "/dev/null"}, "its own"),
        ({"HOME": ""}, "its own"),
        ({}, "its own"),
    ],
)
def test_a_cluster_has_a_token(
    tmp_path: Path, no_token: pytest.MonkeyPatch, environment: dict[str, str], taken: str
) -> None:
    for path in (tmp_path / "given", tmp_path / "old" / ".ray" / "auth_token"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    for name, value in environment.items():
        no_token.setenv(name, value.format(tmp=tmp_path))
    before, home = {name: os.environ.get(name) for name in NAMES}, tmp_path / ".ray" / "auth_token"
    with token_at_hand():
        own = os.environ.get("RAY_AUTH_TOKEN_PATH")
        made = Path(own) if own and own != before["RAY_AUTH_TOKEN_PATH"] else home
        assert made.exists() is (taken != "none made") and (made != home) is (taken == "its own")
        if taken != "none made":
            assert is_at_hand() and len(made.read_text()) == 64
            assert stat.S_IMODE(made.stat().st_mode) == 0o600
        if taken == "its own":
            assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    assert {name: os.environ.get(name) for name in NAMES} == before and made.exists() is (taken == "at home")
    assert [path.read_text() for path in (tmp_path / "given", tmp_path / "old" / ".ray" / "auth_token")] == ["mine"] * 2


def test_a_token_file_that_is_not_there_is_named(tmp_path: Path, no_token: pytest.MonkeyPatch) -> None:
    no_token.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
    with pytest.raises(PreflightError, match=r"RAY_AUTH_TOKEN_PATH is .*gone, and there is no such file"):
        is_at_hand()


def test_launches_that_begin_together_make_one_token(tmp_path: Path, no_token: pytest.MonkeyPatch) -> None:
    no_token.setenv("HOME", str(tmp_path))

    def taken(number: int) -> str:
        assert made_at_home()
        return (tmp_path / ".ray" / "auth_token").read_text()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(taken, range(8)))) == 1
    assert [path.name for path in (tmp_path / ".ray").iterdir()] == ["auth_token"]
