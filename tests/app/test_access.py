"""Who can reach the page."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from support.app import RunningPage, offerings

from bestiary.app.access import read_credentials
from bestiary.app.limits import FORGET_SECONDS, Guesses
from bestiary.app.server import create_app, launch
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
    assert server.client.get("/", headers={"Host": "LocalHost:1"}).status_code == 200
    policy = server.client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize(
    "origin", ["http://other.example", "null", "http://studio.example:1", "studio.example", "http://["]
)
@pytest.mark.parametrize("path", ["/api/draw", "/api/adapters?name=a.safetensors", "/api/catalog"])
def test_another_sites_request_is_refused_by_its_origin(base_folder: Path, origin: str, path: str) -> None:
    """Over plain http with a host name, browsers send no Sec-Fetch-Site."""
    refused, method = ask(base_folder, path, Origin=origin), "GET" if "catalog" in path else "POST"
    assert refused.status_code == 403, method
    own = ask(base_folder, path, Origin="http://studio.example", Host="Studio.example:80")
    assert own.status_code in (200, 405, 422)  # not an order, and not an upload


def test_both_sec_fetch_site_and_origin_must_be_right(base_folder: Path) -> None:
    assert (
        ask(base_folder, "/api/catalog", Sec_Fetch_Site="same-origin", Origin="http://other.example").status_code == 403
    )
    assert ask(base_folder, "/api/catalog", Sec_Fetch_Site="same-site").status_code == 403
    assert ask(base_folder, "/api/catalog", Sec_Fetch_Site="same-origin").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "text/plain;application/json"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 422),  # JSON, but no order
        ({}, 422),
    ],
)
def test_orders_are_accepted_only_as_json(server: RunningPage, headers: dict[str, str], status: int) -> None:
    assert server.client.post("/api/draw", content=b"{}", headers=headers).status_code == status


def ask(base_folder: Path, path: str, **headers: str) -> httpx.Response:
    """Ask a page with a password, on a host name of its own."""
    app = create_app(offerings(base_folder), auth=("ada", "lovelace"))
    sent = {"Host": "studio.example"} | {name.replace("_", "-"): value for name, value in headers.items()}

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x", auth=("ada", "lovelace")) as client:
            method = {"/api/draw": "POST", "/api/catalog": "GET"}.get(path, "PUT")
            return await client.request(method, path, headers=sent)

    return asyncio.run(send())


# ---- guessing the password ----


def test_guesses_at_once_are_not_even_compared(base_folder: Path) -> None:
    app = create_app(offerings(base_folder), auth=("ada", "right"))

    async def guess() -> list[int]:
        transport = httpx.ASGITransport(app=app, client=("192.0.2.1", 5000))
        other = httpx.ASGITransport(app=app, client=("192.0.2.2", 5000))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            wrong = (client.get("/page/main.js", auth=("ada", str(number))) for number in range(50))
            right = client.get("/page/main.js", auth=("ada", "right"))
            answers = list(await asyncio.gather(*wrong, right))
        async with httpx.AsyncClient(transport=other, base_url="http://x") as client:
            answers.append(await client.get("/page/main.js", auth=("ada", "right")))
        return [answer.status_code for answer in answers]

    *wrong, right, elsewhere = asyncio.run(guess())
    assert sorted(wrong) == [401] + [429] * 49
    assert (right, elsewhere) == (429, 200)


def test_each_failure_after_the_third_doubles_the_wait_until_it_is_forgotten() -> None:
    now = 0.0
    guesses = Guesses(lambda: now)
    waits = []
    for _ in range(12):
        waits.append(guesses.failed("a"))
        assert guesses.seconds_to_wait("a") == waits[-1]
        assert guesses.seconds_to_wait("b") == 0
        now += waits[-1]
        assert guesses.seconds_to_wait("a") == 0
    assert waits == [1, 1, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    now += FORGET_SECONDS
    assert guesses.failed("a") == 1


def test_addresses_that_failed_are_forgotten_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bestiary.app.limits.MAX_ADDRESSES", 2)
    guesses = Guesses(lambda: 0.0)
    for address in "abac":
        guesses.failed(address)
    assert [guesses.seconds_to_wait(address) > 0 for address in "abc"] == [True, False, True]
