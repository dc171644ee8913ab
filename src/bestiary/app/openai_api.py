"""OpenAI's images API, as its clients use it: `POST /v1/images/generations` and `GET /v1/models`.

https://platform.openai.com/docs/api-reference/images/create
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bestiary.app.bodies import read_json
from bestiary.app.choices import Wanted, WeightedOffer, make_order, models, named, preferred
from bestiary.app.drawing_queue import DrawingQueue
from bestiary.app.errors import InvalidError
from bestiary.app.events import Picture
from bestiary.app.limits import address_of
from bestiary.app.offers import Offer, Offers
from bestiary.app.orders import NoiseLevel, Order, Weight, parsed
from bestiary.app.program_errors import HANDLERS
from bestiary.app.programs import DrawnResponse, image_base64
from bestiary.errors import shown
from bestiary.params import rising
from bestiary.samplers import SamplerName, SamplingChanges

# A program that names one of OpenAI's own models draws with the champion: only its base URL has to change.
OPENAI_MODELS = re.compile(r"gpt-image-.*|chatgpt-image-latest|dall-e-[23]")
MAX_PICTURES = 10
NAME = "openai"  # marks this API's orders in the queue


class ImagesRequest(BaseModel):
    """What OpenAI's clients send. The last eight fields are Bestiary's: clients send them as `extra_body`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str
    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_PICTURES)
    size: str | None = None
    response_format: Literal["b64_json"] | None = None  # pictures are not stored, so they have no URL
    output_format: Literal["png"] | None = None  # only a PNG stores the settings
    background: Literal["auto", "opaque"] | None = None
    stream: Literal[False] | None = None
    partial_images: Literal[0] | None = None
    quality: str | None = None  # this and the next four have no effect
    style: str | None = None
    moderation: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**53)
    negative_prompt: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: Annotated[tuple[NoiseLevel, NoiseLevel], AfterValidator(rising)] | None = None
    scheduler: SamplerName | None = None
    adapter_weight: Weight | None = None

    @property
    def changes(self) -> SamplingChanges:
        """The requested sampling. Raises InvalidError when the size is invalid."""
        width, height = _sides(self.size)
        return SamplingChanges(
            sampler=self.scheduler,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            width=width,
            height=height,
            negative_prompt=self.negative_prompt,
        )


class OpenAIApi:
    """The routes of OpenAI's API, with the page's queue behind them."""

    def __init__(self, offers: Offers, queue: DrawingQueue) -> None:
        self._offers = offers
        self._queue = queue

    def app(self) -> Starlette:
        """The API as an application, to be mounted at /v1."""
        return Starlette(
            routes=[
                Route("/images/generations", self.generate, methods=["POST"]),
                Route("/models", self.models),
                Route("/models/{name:path}", self.model),
            ],
            exception_handlers=HANDLERS,
        )

    async def generate(self, request: Request) -> Response:
        wanted = parsed(ImagesRequest, await read_json(request))
        order = await asyncio.to_thread(self._order, wanted)
        return DrawnResponse(self._queue.enter(order, address_of(request.scope), NAME), _rendered)

    async def models(self, _: Request) -> Response:
        known = await asyncio.to_thread(models, self._offers)
        return JSONResponse({"object": "list", "data": [_model(name, offer) for name, offer in known.items()]})

    async def model(self, request: Request) -> Response:
        known = await asyncio.to_thread(models, self._offers)
        name = named(request.path_params["name"], known, "model")
        return JSONResponse(_model(name, known[name]))

    def _order(self, wanted: ImagesRequest) -> Order:
        base, offer = "", None
        if wanted.model is None or OPENAI_MODELS.fullmatch(wanted.model):
            offer = preferred(self._offers.listed())
        else:
            known = models(self._offers)
            offer = known[named(wanted.model, known, "model", "model")]
            base = "" if offer else wanted.model
        if offer is None and wanted.adapter_weight is not None:
            raise InvalidError(
                "adapter_weight needs an adapter. Leave it out, or choose an adapter as the model.",
                field="adapter_weight",
            )
        return make_order(
            self._offers,
            [WeightedOffer(offer, wanted.adapter_weight)] if offer else [],
            Wanted(wanted.prompt, wanted.changes, wanted.seed, wanted.n or 1, base),
        )


def _sides(size: str | None) -> tuple[int | None, int | None]:
    if size is None or size == "auto":
        return None, None
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size)
    if not found:
        raise InvalidError(f"Size: {shown(size)} is not a size. Write for example 768x512, or auto.", field="size")
    return int(found[1]), int(found[2])


def _rendered(pictures: Sequence[Picture]) -> object:
    return {
        "created": int(time.time()),
        "output_format": "png",
        "data": [
            {
                "b64_json": image_base64(picture),
                "info": {**picture.settings, "parameters": picture.parameters, "device": picture.device},
            }
            for picture in pictures
        ],
    }


def _model(name: str, offer: Offer | None) -> dict[str, object]:
    about = {"adapter": offer.name, "adapter_sha256": offer.sha256, "aliases": offer.aliases} if offer else {}
    return {"id": name, "object": "model", "created": 0, "owned_by": "bestiary", **about}
