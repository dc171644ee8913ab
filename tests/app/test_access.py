"""Who can reach the page."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from support.app import RunningPage, offerings

from bestiary.app.access import read_credentials
from bestiary.app.server import launch
from bestiary.errors import BestiaryError


def test_another_host_needs_a_password(base_folder: Path) -> None:
    with pytest.raises(BestiaryError, match="BESTIARY_AUTH"):
        launch(offerings(base_folder), host="0.0.0.0")


def test_a_missing_base_and_a_taken_port_are_named(server: RunningPage, base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BestiaryError, match=str(tmp_path / "missing")):
        launch(offerings(tmp_path / "missing"))
    port = server.address.rsplit(":", 1)[1]
    with pytest.raises(BestiaryError, match=port):
        launch(offerings(base_folder), port=int(port))


@pytest.mark.slow
def test_a_page_with_a_password_shows_nothing_without_it(base_folder: Path, tmp_path: Path) -> None:
    guarded = RunningPage(tmp_path, offerings(base_folder), host="0.0.0.0", auth=("ada", "pass:wörd"))
    try:
        address = guarded.address.replace("0.0.0.0", "127.0.0.1")
        for path in ("/", "/api/catalog", "/page/main.js"):
            assert httpx.get(address + path).status_code == 401
        assert httpx.get(address, auth=("ada", "wrong")).status_code == 401
        assert httpx.get(address, auth=("ada", "pass:wörd")).status_code == 200
    finally:
        guarded.stop()


def test_credentials_come_from_the_environment_or_a_private_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BESTIARY_AUTH", raising=False)
    assert read_credentials() is None
    monkeypatch.setenv("BESTIARY_AUTH", "ada:pass:word")
    assert read_credentials() == ("ada", "pass:word")
    file = tmp_path / "auth"
    file.write_text("eve:secret\n")
    file.chmod(0o644)
    with pytest.raises(BestiaryError, match="chmod 600"):
        read_credentials(file)
    file.chmod(0o600)
    assert read_credentials(file) == ("eve", "secret")
    file.write_text("nonsense")
    with pytest.raises(BestiaryError, match="user:password"):
        read_credentials(file)
    with pytest.raises(BestiaryError, match=str(tmp_path / "missing")):
        read_credentials(tmp_path / "missing")


def test_other_sites_and_other_host_names_are_refused(server: RunningPage) -> None:
    assert server.client.get("/", headers={"Host": "evil.example"}).status_code == 403
    assert server.client.get("/api/catalog", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert server.client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200  # links are allowed
    policy = server.client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
