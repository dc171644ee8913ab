"""Uploaded adapters."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import pickle
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import httpx
import pytest
from PIL import ImageChops
from support.app import MAX_UPLOAD_MIB, RunningPage, offerings, pictures

from bestiary.app.offers import Offer, Offers
from bestiary.app.server import create_app
from bestiary.app.uploads import MAX_ARRIVING, MAX_HEADER_MIB, MAX_STORED, Uploads
from bestiary.diffusion.adapter_reading import read_adapter
from bestiary.samplers import Sampling


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/bestiary-was-here",)


def test_only_its_uploader_can_draw_with_an_uploaded_adapter(server: RunningPage, adapter_folder: Path) -> None:
    data = (adapter_folder / "pytorch_lora_weights.safetensors").read_bytes()
    response = server.client.put("/api/adapters", params={"name": "../../my lora.safetensors"}, content=data)
    offer = response.json()
    assert offer["label"] == "my lora.safetensors"
    mine = pictures(server.draw(adapter=offer["key"]))[0]
    local = pictures(server.draw(adapter="local:0"))[0]
    assert not ImageChops.difference(mine, local).getbbox()
    assert offer["key"] not in server.client.get("/api/catalog").text


def test_an_uploaded_kohya_file_draws_the_same_picture(
    server: RunningPage, adapter_folder: Path, tmp_path: Path
) -> None:
    from bestiary.diffusion.conversion import convert

    data = convert(adapter_folder, tmp_path / "kohya.safetensors", "kohya").read_bytes()
    offer = server.client.put("/api/adapters", params={"name": "kohya.safetensors"}, content=data).json()
    uploaded, local = (pictures(server.draw(adapter=key))[0] for key in (offer["key"], "local:0"))
    assert not ImageChops.difference(uploaded, local).getbbox()


def test_an_uploaded_few_step_adapter_says_what_it_changes_and_how_it_is_drawn(
    server: RunningPage, adapter_folder: Path
) -> None:
    data = (adapter_folder / "pytorch_lora_weights.safetensors").read_bytes()
    offer = server.client.put("/api/adapters", params={"name": "TCD-SD15-LoRA.safetensors"}, content=data).json()
    assert list(offer["modules"]) == ["unet"]
    assert offer["modules"]["unet"] > 0
    assert (offer["usual"]["scheduler"], offer["usual"]["steps"], offer["usual"]["guidance_scale"]) == ("tcd", 4, 1.0)


def test_a_few_step_adapter_is_drawn_at_its_own_timesteps_and_in_no_other_number_of_steps(
    server: RunningPage, adapter_folder: Path
) -> None:
    sampling = Sampling("lcm", steps=2, guidance_scale=1.0, timesteps=(999, 699))
    content = replace(read_adapter(adapter_folder / "pytorch_lora_weights.safetensors"), few_step=sampling)
    name = {"name": "fast.safetensors"}
    offer = server.client.put("/api/adapters", params=name, content=content.to_bytes()).json()
    order = {"adapter": offer["key"], "scheduler": "lcm", "guidance_scale": 1.0}
    (drawn,) = pictures(server.draw(**order, steps=2, more_adapters=[{"adapter": "local:0", "weight": 0.5}]))
    assert json.loads(drawn.info["bestiary"])["timesteps"] == [999, 699]
    assert "was distilled for 2 steps, not for 20" in server.refusal(**order, steps=20)["message"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", pickle.dumps(Evil()), b"\x08" + b"\0" * 7 + b"{}      "])
def test_a_file_that_is_not_an_adapter_is_refused_and_never_executed(server: RunningPage, content: bytes) -> None:
    response = server.client.put("/api/adapters", params={"name": "evil.safetensors"}, content=content)
    assert response.status_code == 422
    assert "evil.safetensors" in response.json()["message"]
    assert "/tmp" not in response.text
    assert not Path("/tmp/bestiary-was-here").exists()


def test_a_pickle_of_tensors_is_refused_on_the_page_too(server: RunningPage, adapter_folder: Path) -> None:
    from io import BytesIO

    import torch
    from safetensors.torch import load_file

    weights = load_file(adapter_folder / "pytorch_lora_weights.safetensors")
    data = BytesIO()
    torch.save({key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): weights[key] for key in weights}, data)
    response = server.client.put("/api/adapters", params={"name": "a.safetensors"}, content=data.getvalue())
    assert response.json()["message"] == "a.safetensors is a torch pickle. Convert it with `bestiary adapter convert`."


def test_an_upload_onto_a_full_disk_is_refused_in_one_sentence(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def upload() -> httpx.Response:
        transport = httpx.ASGITransport(app=create_app(offerings(base_folder)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            monkeypatch.setattr(Path, "open", full)
            return await client.put("/api/adapters", params={"name": "a.safetensors"}, content=b"x")

    response = asyncio.run(upload())
    assert response.status_code == 422
    assert response.json()["key"] == "noSpace"
    assert "a.safetensors" in response.json()["message"]


def test_an_upload_for_another_base_is_refused_unless_a_base_is_chosen(
    server: RunningPage, adapter_folder: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(adapter_folder / "pytorch_lora_weights.safetensors", "pt") as file:
        about = file.metadata() | {"bestiary": json.dumps({"base": "somebody/else", "base_sha256": "0" * 64})}
        data = save({key: file.get_tensor(key) for key in file.keys()}, about)  # noqa: SIM118
    key = server.client.put("/api/adapters", params={"name": "far.safetensors"}, content=data).json()["key"]
    refusal = server.refusal(adapter=key)
    sentence = refusal["message"]
    assert refusal["key"] == "otherBase"
    assert refusal["values"]["name"] == "far.safetensors"
    assert all(name in sentence for name in ("far.safetensors", "models/base", "somebody/else"))
    assert len(pictures(server.draw(adapter=key, base="models/base"))) == 1


def test_an_upload_of_the_wrong_type_or_size_is_refused(server: RunningPage) -> None:
    response = server.client.put("/api/adapters", params={"name": "lora.pt"}, content=b"x")
    assert response.json()["key"] == "onlySafetensors"
    response = server.client.put(
        "/api/adapters", params={"name": "a.safetensors"}, content=bytes(MAX_UPLOAD_MIB * 2**20 + 1)
    )
    assert response.json()["values"] == {"name": "a.safetensors", "limit": str(MAX_UPLOAD_MIB)}
    assert f"a.safetensors is larger than {MAX_UPLOAD_MIB} MiB" in response.json()["message"]


def test_too_many_simultaneous_uploads_are_refused(base_folder: Path) -> None:
    async def upload() -> list[str]:
        transport = httpx.ASGITransport(app=create_app(offerings(base_folder)))
        all_have_started = asyncio.Event()
        started = 0

        async def slowly() -> AsyncIterator[bytes]:
            nonlocal started
            started += 1
            if started == MAX_ARRIVING:
                all_have_started.set()
            await all_have_started.wait()
            yield b"x"

        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            responses = await asyncio.gather(
                *(
                    client.put("/api/adapters", params={"name": f"{n}.safetensors"}, content=slowly())
                    for n in range(MAX_ARRIVING + 1)
                )
            )
            again = await client.put("/api/adapters", params={"name": "late.safetensors"}, content=b"x")
        return [response.json()["key"] or response.json()["message"] for response in [*responses, again]]

    *tried, refused, late = asyncio.run(asyncio.wait_for(upload(), 60))
    assert refused == "uploadsFull"
    assert all("safetensors is" in message for message in [*tried, late])  # received, but not an adapter


def test_a_stalled_upload_is_dropped(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bestiary.app.uploads.UPLOAD_SECONDS", 0.3)

    async def silent() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(30)

    async def upload() -> httpx.Response:
        transport = httpx.ASGITransport(app=create_app(offerings(base_folder)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.put("/api/adapters", params={"name": "slow.safetensors"}, content=silent())

    response = asyncio.run(asyncio.wait_for(upload(), 20))
    assert response.json()["key"] == "late"
    assert "slow.safetensors took longer than 0.005 minutes" in response.json()["message"]


def test_a_file_with_too_much_metadata_is_refused_before_it_is_parsed(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bestiary.app.offers.Offers.add_upload", lambda *_: pytest.fail("It was parsed."))
    arrived = 0

    async def large() -> AsyncIterator[bytes]:
        nonlocal arrived
        yield (MAX_HEADER_MIB * 2**20 + 1).to_bytes(8, "little")[:5]
        for _ in range(50):
            arrived += 1
            yield b"\0" * 2**20

    async def upload() -> httpx.Response:
        transport = httpx.ASGITransport(app=create_app(offerings(base_folder)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.put("/api/adapters", params={"name": "a.safetensors"}, content=large())

    response = asyncio.run(upload())
    assert response.json()["key"] == "longHeader"
    assert response.json()["values"] == {"name": "a.safetensors", "limit": str(MAX_HEADER_MIB)}
    assert arrived < 5


def test_uploads_are_parsed_one_at_a_time(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that several large ones do not fill the memory."""
    parsing, most = 0, 0

    def parse(offers: Offers, key: str, name: str, file: Path) -> Offer:
        nonlocal parsing, most
        parsing += 1
        most = max(most, parsing)
        time.sleep(0.05)
        parsing -= 1
        offer = Offer(key, "upload", name, str(file))
        offers.uploads[key] = offer
        return offer

    monkeypatch.setattr(Offers, "add_upload", parse)
    offers = Offers(offerings(base_folder))

    async def upload() -> None:
        uploads = Uploads(offers, 1)
        await asyncio.gather(*(uploads.receive("a.safetensors", chunks(), "a") for _ in range(MAX_ARRIVING)))

    asyncio.run(upload())
    assert most == 1


def test_one_address_cannot_push_out_the_uploads_of_others(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(offers: Offers, key: str, name: str, file: Path) -> Offer:
        offers.uploads[key] = Offer(key, "upload", name, str(file))
        return offers.uploads[key]

    monkeypatch.setattr(Offers, "add_upload", parse)
    offers = Offers(offerings(base_folder))

    async def upload() -> tuple[Offer, int]:
        uploads = Uploads(offers, 1)
        mine = await uploads.receive("mine.safetensors", chunks(), "a")
        for _ in range(2 * MAX_STORED):
            await uploads.receive("theirs.safetensors", chunks(), "b")
        return mine, len([*Path(mine.what).parent.iterdir()])

    mine, stored = asyncio.run(upload())
    assert mine.key in offers.uploads
    assert stored == len(offers.uploads) == MAX_STORED


async def chunks() -> AsyncIterator[bytes]:
    yield bytes(100)
