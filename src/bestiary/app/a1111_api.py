"""A1111's API, as its clients use it: txt2img, img2img, its lists, its progress and its interruption.

https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/API
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

from pydantic import RootModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bestiary import __version__
from bestiary.app.a1111_requests import (
    CHECKPOINT,
    SCHEDULES,
    Img2ImgRequest,
    Txt2ImgRequest,
    check_options,
    split_prompt,
)
from bestiary.app.bodies import MAX_ORDER_BYTES, read_json
from bestiary.app.choices import Lora, Wanted, WeightedOffer, by_name, loras, make_order, named
from bestiary.app.drawing_queue import DrawingQueue
from bestiary.app.errors import InvalidError
from bestiary.app.events import Picture
from bestiary.app.limits import address_of
from bestiary.app.offers import Offers
from bestiary.app.orders import Order, parsed
from bestiary.app.program_errors import HANDLERS
from bestiary.app.programs import DrawnResponse, Render, image_base64
from bestiary.app.uploads import UPLOAD_SECONDS, Uploads
from bestiary.samplers import DEFAULT_DENOISE, SAMPLERS

NAME = "a1111"  # marks this API's orders in the queue
MAX_REMEMBERED = 1000  # number of addresses whose chosen base is stored
MAX_IMAGE_MIB = 32  # largest image to start from; it is in memory while it arrives
# Lists that clients request when they connect, and that are empty here.
EMPTY: dict[str, object] = {
    "cmd-flags": {},
    "embeddings": {"loaded": {}, "skipped": {}},
    "face-restorers": [],
    "hypernetworks": [],
    "prompt-styles": [],
    "scripts": {"txt2img": [], "img2img": []},
    "sd-vae": [],
    "upscalers": [],
}
Options = RootModel[dict[str, object]]


class A1111Api:
    """The routes of A1111's API, with the page's queue behind them."""

    def __init__(self, offers: Offers, queue: DrawingQueue, uploads: Uploads) -> None:
        self._offers = offers
        self._queue = queue
        self._uploads = uploads
        self._chosen_bases: dict[str, str] = {}  # base by address; A1111 stores this choice in its options

    def app(self) -> Starlette:
        """The API as an application, to be mounted at /sdapi/v1."""
        return Starlette(
            routes=[
                Route("/txt2img", self.txt2img, methods=["POST"]),
                Route("/img2img", self.img2img, methods=["POST"]),
                Route("/sd-models", self.sd_models),
                Route("/loras", self.loras),
                Route("/samplers", self.samplers),
                Route("/schedulers", self.schedulers),
                Route("/options", self.options),
                Route("/options", self.set_options, methods=["POST"]),
                Route("/progress", self.progress),
                Route("/interrupt", self.interrupt, methods=["POST"]),
                Route("/refresh-checkpoints", self.refresh, methods=["POST"]),
                Route("/refresh-loras", self.refresh, methods=["POST"]),
                Route("/{name}", self.empty),
            ],
            exception_handlers=HANDLERS,
        )

    # ---- drawing ----

    async def txt2img(self, request: Request) -> Response:
        body = await read_json(request)
        wanted, address = parsed(Txt2ImgRequest, body), address_of(request.scope)
        wanted.check()
        order = await asyncio.to_thread(self._order, wanted, address)
        return DrawnResponse(self._queue.enter(order, address, NAME), _rendering(json.loads(body), order))

    async def img2img(self, request: Request) -> Response:
        address = address_of(request.scope)
        most_mib = min(MAX_IMAGE_MIB, self._uploads.max_mib)
        with self._uploads.arriving(address):
            body = await read_json(
                request,
                MAX_ORDER_BYTES + 4 * most_mib * 2**20 // 3,  # base64 writes 4 characters for 3 bytes
                UPLOAD_SECONDS,
                InvalidError(f"The request is too long. Send an image of at most {most_mib} MiB.", field="init_images"),
            )
            wanted = await asyncio.to_thread(parsed, Img2ImgRequest, body)
            wanted.check()
            content = await asyncio.to_thread(wanted.image)
        image = await self._uploads.receive_image("init_images[0]", _whole(content), address)
        try:
            order = await asyncio.to_thread(self._order, wanted, address, image.key, wanted.denoising_strength)
            wanted.check_shape(image.size, (order.width, order.height))
            drawing = self._queue.enter(order, address, NAME)
        except BaseException:  # including a client that disconnects
            self._uploads.forget(image.key)
            raise
        parameters = wanted.model_dump(exclude_unset=True) | {"init_images": None}  # as A1111 answers
        return DrawnResponse(drawing, _rendering(parameters, order), lambda: self._uploads.forget(image.key))

    def _order(self, wanted: Txt2ImgRequest, address: str, image: str = "", denoise: float = DEFAULT_DENOISE) -> Order:
        prompt, tags = split_prompt(wanted.prompt)
        if not prompt:
            raise InvalidError("Prompt: write what to draw.", field="prompt")
        names = by_name(loras(self._offers.listed())) if tags else {}
        return make_order(
            self._offers,
            [WeightedOffer(names[named(tag.name, names, "adapter", "prompt")].offer, tag.weight) for tag in tags],
            Wanted(
                prompt,
                wanted.changes,
                None if wanted.seed in (None, -1) else wanted.seed,
                wanted.count,
                self._base(wanted.checkpoint) if wanted.checkpoint else self._chosen_bases.get(address, ""),
                image,
                denoise,
                preview=True,
            ),
        )

    def _base(self, name: str) -> str:
        return named(name, self._offers.bases, "base", CHECKPOINT)

    async def progress(self, request: Request) -> Response:
        """The progress of the oldest order of the client's address. Orders of other addresses are not shown.

        Each request asks for the next preview; current_image is the one that an earlier request asked for.
        """
        drawing = self._queue.oldest(address_of(request.scope), NAME)
        told = drawing.progress if drawing else None
        done, total = (told.done, told.total) if told else (0, 1)
        steps = drawing.order.drawn_steps if drawing else 0
        state = {
            "skipped": False,
            "interrupted": bool(drawing and drawing.stopped.is_set()),
            "job": ("img2img" if drawing.order.image else "txt2img") if drawing else "",
            "job_count": drawing.order.count if drawing else 0,
            "job_timestamp": "0",
            "job_no": done // steps if steps else 0,
            "sampling_step": done % steps if steps else 0,
            "sampling_steps": steps,
        }
        preview = drawing.preview if drawing else None
        if drawing and request.query_params.get("skip_current_image", "false").lower() not in ("true", "1"):
            drawing.wants_preview.set()
        else:
            preview = None
        answer = {"progress": done / total, "eta_relative": told.seconds_left if told else 0.0, "state": state}
        return JSONResponse(answer | {"current_image": preview and image_base64(preview), "textinfo": None})

    async def interrupt(self, request: Request) -> Response:
        """End the oldest order of the client's address. It is answered with its finished pictures."""
        if drawing := self._queue.oldest(address_of(request.scope), NAME):
            self._queue.interrupt(drawing)
        return JSONResponse({})

    # ---- lists ----

    async def sd_models(self, _: Request) -> Response:
        """The bases, without hashes, because hashing a large base takes seconds."""
        return JSONResponse(
            [
                {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
                for name in self._offers.bases
            ]
        )

    async def loras(self, _: Request) -> Response:
        offers = await asyncio.to_thread(self._offers.listed)
        return JSONResponse([_lora(lora) for lora in loras(offers)])

    async def samplers(self, _: Request) -> Response:
        return JSONResponse(
            [{"name": sampler.label, "aliases": [key], "options": {}} for key, sampler in SAMPLERS.items()]
        )

    async def schedulers(self, _: Request) -> Response:
        names = {label.lower().replace(" ", "_"): label for label in SCHEDULES}
        return JSONResponse([{"name": name, "label": label, "aliases": None} for name, label in names.items()])

    async def options(self, request: Request) -> Response:
        default = next(iter(self._offers.bases))
        base = self._chosen_bases.get(address_of(request.scope), default)
        return JSONResponse({CHECKPOINT: base, "CLIP_stop_at_last_layers": 1, "samples_format": "png"})

    async def set_options(self, request: Request) -> Response:
        """Store the base that an address chose, as A1111 does. It does not change the choice of other addresses."""
        options = parsed(Options, await read_json(request)).root
        check_options(options)
        if CHECKPOINT in options:
            base, address = self._base(str(options[CHECKPOINT])), address_of(request.scope)
            if len(self._chosen_bases) >= MAX_REMEMBERED:
                self._chosen_bases.clear()
            self._chosen_bases[address] = base
        return JSONResponse(None)

    async def refresh(self, _: Request) -> Response:
        return JSONResponse(None)  # the lists are always up to date

    async def empty(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in EMPTY:
            raise InvalidError(f"There is no {request.method} {request.url.path[:200]} here.", 404)
        return JSONResponse(EMPTY[name])


def _lora(lora: Lora) -> dict[str, object]:
    offer = lora.offer
    about = {"adapter": offer.name, "adapter_sha256": offer.sha256, "aliases": offer.aliases, "scores": offer.scores}
    alias = lora.aliases[0] if lora.aliases else lora.name
    return {"name": lora.name, "alias": alias, "path": offer.name, "metadata": about}


async def _whole(content: bytes) -> AsyncIterator[bytes]:
    yield content


def _rendering(parameters: object, order: Order) -> Render:
    """How the answer to a request with these parameters shows the order's pictures."""

    def render(pictures: Sequence[Picture]) -> object:
        if not pictures:  # a drawing ends early only when `interrupt` stops it
            raise InvalidError("The drawing was interrupted before its first picture was finished.", 409)
        return {
            "images": [image_base64(picture) for picture in pictures],
            "parameters": parameters,
            "info": json.dumps(_info(pictures, order), ensure_ascii=False),
        }

    return render


def _info(pictures: Sequence[Picture], order: Order) -> dict[str, object]:
    """A1111's description of one request's pictures; `bestiary` has the settings and adapters of each picture."""
    settings = [dict(picture.settings) for picture in pictures]
    first, count = settings[0], len(pictures)
    width, height = (first.get(side) or first["resolution"] for side in ("width", "height"))
    seeds = [its["seed"] for its in settings]
    negative = first.get("negative_prompt", "")
    return {
        "prompt": first["prompt"],
        "all_prompts": [first["prompt"]] * count,
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * count,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * count,
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": SAMPLERS[order.scheduler].label,
        "cfg_scale": first["guidance_scale"],
        "steps": first["steps"],
        "batch_size": count,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": first["base"],
        "sd_model_hash": None,
        "denoising_strength": order.denoise if order.image else None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [picture.parameters for picture in pictures],
        "styles": [],
        "job_timestamp": datetime.now(UTC).strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": f"Bestiary {__version__}",
        "interrupted": count < order.count,
        "bestiary": settings,
    }
