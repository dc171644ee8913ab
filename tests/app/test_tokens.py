"""Programs: who may draw, what a refused one is told, and that one that goes away leaves the queue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from support.app import RunningPage, offerings, pictures
from webuiapi import WebUIApi

from bestiary.app.access import Credentials
from bestiary.app.server import create_app
from bestiary.app.tokens import Token, read_token
from bestiary.errors import BestiaryError

SECRET = "0123456789abcdef-a-token"
AUTH = ("ada", "lovelace")
REQUEST: dict[str, Any] = {"prompt": "a tiger", "steps": 1, "seed": 7}
BEARER, WRONG = f"Bearer {SECRET}", "Bearer 0123456789abcdef-another"


def ask(
    base: Path, path: str, *, token: str | None = SECRET, auth: Credentials | None = None, **headers: str
) -> httpx.Response:
    """Ask a server in this process for `path`, with these headers."""
    app = create_app(offerings(base), auth=auth, token=Token(token) if token else None)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as client:
            return await client.get(path, headers=sent)

    return asyncio.run(send())


def sentence(response: httpx.Response) -> str:
    """The refusal, which must have the form that the path's clients read."""
    answer = response.json()
    if str(response.url.path).startswith("/v1/"):
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        told = answer["error"]["message"]
    else:
        assert set(answer) == {"error", "detail", "body", "errors"}
        told = answer["detail"]
    assert isinstance(told, str)
    return told


@pytest.mark.parametrize("path", ["/v1/models", "/sdapi/v1/samplers"])
@pytest.mark.parametrize(
    ("token", "auth", "header", "status"),
    [
        (None, None, "", 200),
        (SECRET, None, "", 401),
        (SECRET, None, BEARER, 200),
        (SECRET, None, BEARER.replace("Bearer", "bearer"), 200),
        (SECRET, None, WRONG, 401),
        (SECRET, None, f"Basic {SECRET}", 401),
        (SECRET, AUTH, BEARER, 200),
        (SECRET, AUTH, "Basic YWRhOmxvdmVsYWNl", 200),
        (None, AUTH, "Basic YWRhOmxvdmVsYWNl", 200),
        (None, AUTH, BEARER, 401),
        (None, AUTH, "", 401),
    ],
)
def test_programs_need_the_token_or_the_password_if_there_are_any(
    base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    token: str | None,
    auth: Credentials | None,
    header: str,
    status: int,
) -> None:
    monkeypatch.setattr("bestiary.app.access.WRONG_PASSWORD_SECONDS", 0.0)
    response = ask(base_folder, path, token=token, auth=auth, **({"Authorization": header} if header else {}))
    assert response.status_code == status
    if status == 401:
        assert sentence(response).endswith(".")
        assert response.headers["WWW-Authenticate"].startswith("Bearer" if token else "Basic")


def test_the_token_opens_the_programs_apis_only(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bestiary.app.access.WRONG_PASSWORD_SECONDS", 0.0)
    for path in ("/", "/api/catalog"):
        assert ask(base_folder, path, auth=AUTH, Authorization=BEARER).status_code == 401
        assert ask(base_folder, path).status_code == 200  # on this machine, the page needs no token


@pytest.mark.parametrize("path", ["/v1/models", "/sdapi/v1/samplers"])
def test_other_sites_and_other_host_names_are_refused(base_folder: Path, path: str) -> None:
    for headers in ({"Origin": "http://other.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        for token in (None, SECRET):
            refused = ask(base_folder, path, token=token, auth=None, Authorization=BEARER, **headers)
            assert refused.status_code == 403
            assert "site" in sentence(refused)
    rebound = ask(base_folder, path, token=None, Host="evil.example")
    assert rebound.status_code == 403
    assert "localhost" in sentence(rebound)
    assert ask(base_folder, path, Host="studio.example", Authorization=BEARER).status_code == 200


def test_wrong_tokens_are_slowed_down(base_folder: Path) -> None:
    app = create_app(offerings(base_folder), token=Token(SECRET))

    async def guess() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app, client=("192.0.2.1", 5000))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            guesses = (client.get("/v1/models", headers={"Authorization": value}) for value in (WRONG, WRONG, BEARER))
            return list(await asyncio.gather(*guesses))

    first, *others = asyncio.run(guess())
    assert first.status_code == 401
    assert [each.status_code for each in others] == [429, 429]
    assert int(others[0].headers["Retry-After"]) >= 1
    assert "Try again" in sentence(others[0])


def test_a_token_comes_from_the_environment_or_a_private_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BESTIARY_TOKEN", raising=False)
    assert read_token() is None
    monkeypatch.setenv("BESTIARY_TOKEN", SECRET)
    token = read_token()
    assert token is not None
    assert token.matches(SECRET)
    assert not token.matches(SECRET[:-1])
    assert SECRET not in repr(vars(token))
    file = tmp_path / "token"
    for text in ("", "short", "spaces are not allowed", "ein-schlüssel-mit-umlaut"):
        file.write_text(text)
        file.chmod(0o600)
        with pytest.raises(BestiaryError, match="openssl rand") as refused:
            read_token(file)
        assert not text or text not in str(refused.value)
    file.write_text(f"{SECRET}\n")
    file.chmod(0o644)
    with pytest.raises(BestiaryError, match="chmod 600"):
        read_token(file)


@pytest.fixture(scope="module")
def guarded(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPage]:
    """A server that others can reach, with a password for the page and a token for programs."""
    running = RunningPage(
        tmp_path_factory.mktemp("guarded"), offerings(base_folder), host="0.0.0.0", auth=AUTH, token=Token(SECRET)
    )
    running.address = running.address.replace("0.0.0.0", "127.0.0.1")
    yield running
    running.stop()


def test_the_real_clients_send_the_token_which_no_log_shows(guarded: RunningPage) -> None:
    answer = OpenAI(base_url=f"{guarded.address}/v1", api_key=SECRET, max_retries=0)
    assert answer.images.generate(prompt="a tiger", extra_body={"steps": 1}).data
    api = WebUIApi(baseurl=f"{guarded.address}/sdapi/v1", username="ada", password="lovelace")
    assert api.get_samplers()[0]["name"] == "DDPM"
    api = WebUIApi(baseurl=f"{guarded.address}/sdapi/v1")
    assert api.get_samplers()["error"] == "HTTPException"
    api.session.headers["Authorization"] = BEARER
    assert api.get_samplers()[0]["name"] == "DDPM"
    with pytest.raises(openai.AuthenticationError) as refused:
        OpenAI(base_url=f"{guarded.address}/v1", api_key=WRONG, max_retries=0).models.list()
    assert refused.value.code == "invalid_api_key"
    assert SECRET not in guarded.log.read_text() + json.dumps(refused.value.body)


# ---- limits ----


def post(base: Path, path: str) -> httpx.Response:
    """Send REQUEST to a server in this process, whose limits a test can change."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=create_app(offerings(base)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, json=REQUEST)

    return asyncio.run(send())


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img"])
@pytest.mark.parametrize(("limit", "status"), [("MAX_WAITING", 503), ("MAX_OPEN_PER_ADDRESS", 429)])
def test_a_full_queue_says_when_to_try_again(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, path: str, limit: str, status: int
) -> None:
    monkeypatch.setattr(f"bestiary.app.drawing_queue.{limit}", 0)
    refused = post(base_folder, path)
    assert refused.status_code == status
    assert refused.headers["Retry-After"] == "5"
    assert sentence(refused).endswith(".")


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img"])
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_another_sites_form_is_refused(server: RunningPage, path: str, content_type: str) -> None:
    refused = server.client.post(path, content=json.dumps(REQUEST), headers={"Content-Type": content_type})
    assert refused.status_code == 415
    assert "application/json" in sentence(refused)


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img"])
def test_a_malformed_request_is_refused_in_one_sentence(server: RunningPage, path: str) -> None:
    for body in (b"", b"[]", b"\xff", b"{" * 1000, b"x" * 100_000):
        refused = server.client.post(path, content=body)
        assert refused.status_code == (400 if path.startswith("/v1/") else 422)
        assert "\n" not in sentence(refused)


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img"])
def test_a_client_that_goes_away_leaves_the_queue(server: RunningPage, path: str) -> None:
    many = {"n": 10} if path.startswith("/v1/") else {"batch_size": 10}
    for _ in range(2):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.address + path, json=REQUEST | many | {"steps": 400}, timeout=0.5)
    assert len(pictures(server.draw(steps=1))) == 1  # 8,000 steps would have delayed it by minutes
