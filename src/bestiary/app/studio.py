"""What the page draws with: one base in memory, the adapters on offer, and one picture after the other.

Nothing here knows the web: an order comes in, events go out through a callback.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from bestiary.app.errors import RefusedError, Stopped
from bestiary.app.events import Event, Loading, Note, Picture, Preview, Progress, Role
from bestiary.errors import BestiaryError
from bestiary.params import Scheduler, rising
from bestiary.settings import SAMPLERS, Settings, Usual, as_a1111, finish
from bestiary.subjects import ANIMALS, caption, find_subject

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

    from bestiary.registry import Adapter

Tell = Callable[[Event], None]

LARGEST_SIDE, SIDE_STEP = 1024, 64  # pixels
PREVIEW_SIDE = 16  # latents; larger ones are shrunk first, because decoding them would cost more than the step
PREVIEW_EVERY_SECONDS = 0.25
PREVIEW_SHARE = 0.1  # of the time
SCORES = ("clip_score", "top1")

log = logging.getLogger(__name__)


NoiseLevel = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Order(BaseModel):
    """What a browser asks for. Adapter, base and device are keys of what `Studio.catalog` offers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    adapter: str = "none"
    base: str = ""  # empty: the one that the adapter was trained on
    device: str = ""  # empty: the best
    animal: str = Field(default="", max_length=200)
    prompt: str = Field(default="", max_length=1000)  # in place of the sentence around the animal
    steps: int = Field(ge=1, le=400)
    guidance_scale: float = Field(ge=1, le=20)
    guidance_interval: Annotated[tuple[NoiseLevel, NoiseLevel], AfterValidator(rising)] | None = None
    scheduler: Scheduler
    seed: int = Field(ge=0, lt=2**53)  # what a browser counts exactly
    count: int = Field(default=1, ge=1, le=16)
    resolution: int | None = Field(default=None, multiple_of=SIDE_STEP, ge=SIDE_STEP, le=LARGEST_SIDE)  # None: base's
    compare: bool = False  # the base's picture of the same seed beside each
    preview: bool = True

    @staticmethod
    def parse(data: bytes) -> Order:
        """The order in a request's body. Raises BestiaryError that names what is wrong with it."""
        try:
            order = Order.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = " ".join(str(part).replace("_", " ") for part in first["loc"]) or "this request"
            given = repr(first["input"])
            shown = f", not {given}" if len(given) < 40 else ""
            raise BestiaryError(f"{where[0].upper()}{where[1:]}: {_lower(first['msg'])}{shown}.") from None
        if not (order.animal.strip() or order.prompt.strip()):
            raise RefusedError("missing", "Name an animal, or write a prompt.")
        return order


@dataclass(frozen=True)
class Offer:
    """An adapter that the page may ask for by its key; `what` is what the registry resolves, and stays here."""

    key: str
    kind: str  # registry | local | upload
    label: str
    what: str
    aliases: tuple[str, ...] = ()
    scores: Mapping[str, str] | None = None
    usual: Usual | None = None  # where it says how it was evaluated

    def public(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "kind": self.kind,
            "label": self.label,
            "aliases": self.aliases,
            "scores": self.scores or {},
            "usual": asdict(self.usual) if self.usual else None,
        }


@dataclass
class Loaded:
    """The one pipeline in memory, and what it is."""

    pipeline: StableDiffusionPipeline
    base: tuple[str, str | None]
    device: str
    adapter: object = None  # what identifies the adapter that is applied
    adapter_sha256: str = ""


class Base(NamedTuple):
    """A base: a folder or an id on the Hugging Face hub, and the hub's revision."""

    model: str
    revision: str | None = None


@dataclass(frozen=True)
class Offerings:
    """What the page may draw with."""

    bases: tuple[Base, ...]  # the first is the default
    adapters: tuple[str, ...] = ("models/adapter",)  # files or folders, beside the registered versions
    defaults: Usual = field(default_factory=Usual)  # for adapters that are not registered
    registered_name: str = "bestiary"


class Studio:
    """Draws one order at a time: call `draw` from one thread only."""

    def __init__(self, offerings: Offerings) -> None:
        self.default_base = offerings.bases[0]
        self.bases = {_short(base.model): base for base in offerings.bases}
        self.usual = offerings.defaults
        self.local = offerings.adapters
        self.registered_name = offerings.registered_name
        self.uploads: dict[str, Offer] = {}
        self._loaded: Loaded | None = None
        self._resolved: dict[str, Adapter] = {}

    # ---- what there is ----

    def offers(self) -> list[Offer]:
        """The adapters that anybody may choose: registered versions, newest first, then the folders of this machine."""
        return [*self._registered(), *self._folders()]

    def catalog(self) -> dict[str, Any]:
        """All that the page offers, and what it starts with."""
        from bestiary.diffusion.base import device_and_dtype

        offers = self.offers()
        with self._without_paths():
            own = native_side(*self.default_base)
        best = device_and_dtype()[0].type
        champion = next((offer.key for offer in offers if "champion" in offer.aliases), None)
        return {
            "animals": [{"folder": a.folder, "name": a.name, "chinese": a.chinese} for a in ANIMALS],
            "adapters": [offer.public() for offer in offers],
            "bases": list(self.bases),
            "devices": list(dict.fromkeys([best, "cpu"])),
            "schedulers": {name: sampler.label for name, sampler in SAMPLERS.items()},
            "resolutions": sorted({own, *range(min(own, 256), LARGEST_SIDE + 1, SIDE_STEP)}),
            "adapter": champion or (offers[0].key if offers else "none"),
            "usual": asdict(self.usual) | {"resolution": own},
        }

    def _registered(self) -> list[Offer]:
        from bestiary.registry import usual_of, versions

        try:
            found = versions(self.registered_name)
        except BestiaryError as error:  # no registry yet is no reason not to draw
            log.info("%s", error)
            return []
        return [
            Offer(
                f"models:/{item.name}/{item.version}",
                "registry",
                f"{item.name} {item.version}",
                f"models:/{item.name}/{item.version}",
                tuple(item.aliases),
                {score: item.tags[f"delta.{score}"] for score in SCORES if f"delta.{score}" in item.tags},
                usual_of(item),
            )
            for item in reversed(found)
        ]

    def _folders(self) -> list[Offer]:
        from bestiary.diffusion.adapter import adapter_file

        offers = []
        for number, path in enumerate(self.local):
            with contextlib.suppress(BestiaryError):  # models/adapter is there once it has been trained
                adapter_file(path)
                offers.append(Offer(f"local:{number}", "local", _short(path), path))
        return offers

    def add_upload(self, key: str, name: str, file: Path) -> Offer:
        """Offer an uploaded file to whoever knows its key. Raises BestiaryError when it is no adapter.

        A file of kohya's kind is put into diffusers' format in its place.
        """
        from bestiary.diffusion.adapter import read_provenance
        from bestiary.diffusion.conversion import convert, is_kohya

        offer = Offer(key, "upload", name, str(file))
        with self._without_paths({offer.what: name}):
            if is_kohya(file):
                convert(file, file, "diffusers")
            read_provenance(file)
        self.uploads[key] = offer
        return offer

    # ---- drawing ----

    def warm(self) -> None:
        """Load the default base, so that the first picture need not wait for it."""
        try:
            self._load(self.default_base, "", lambda _: None)
        except BestiaryError as error:
            log.warning("%s", error)

    def draw(self, order: Order, tell: Tell, stopped: threading.Event) -> None:
        """Draw what the order says and tell of it: loading, progress, preview, picture.

        Raises BestiaryError for what cannot be drawn, Stopped soon after `stopped` is set.
        """
        from bestiary.diffusion.adapter import set_scale
        from bestiary.diffusion.sampling import generate

        def check() -> None:
            if stopped.is_set():
                raise Stopped

        check()
        with self._without_paths():
            loaded, label, usual = self._prepare(order, tell)
        prompt, note = _prompt(order, usual.template)
        if note:
            tell(note)
        roles: list[Role] = ["adapter", "base"] if order.compare and order.adapter != "none" else ["adapter"]
        jobs = [(order.seed + number, role) for number in range(order.count) for role in roles]
        started = time.monotonic()
        for position, (seed, role) in enumerate(jobs):
            if loaded.adapter is not None:
                set_scale(loaded.pipeline, 0.0 if role == "base" else 1.0)

            def progress(done: int, _: int, before: int = position * order.steps) -> None:
                check()
                total = len(jobs) * order.steps
                left = (time.monotonic() - started) / (before + done) * (total - before - done)
                tell(Progress(before + done, total, round(left, 1)))

            def show(image: Image, role: Role = role) -> None:
                buffer = BytesIO()
                image.save(buffer, "JPEG")
                tell(Preview(role, _data_uri("jpeg", buffer.getvalue())))

            with previews(loaded.pipeline, order.guidance_scale, show) if order.preview else contextlib.nullcontext():
                image = generate(
                    loaded.pipeline,
                    [prompt],
                    [seed],
                    steps=order.steps,
                    guidance_scale=order.guidance_scale,
                    guidance_interval=order.guidance_interval,
                    scheduler=order.scheduler,
                    batch_size=1,
                    resolution=order.resolution,
                    progress=progress,
                )[0]
            plain = role == "base" or loaded.adapter is None
            settings = Settings(
                prompt=prompt,
                seed=seed,
                steps=order.steps,
                guidance_scale=order.guidance_scale,
                guidance_interval=order.guidance_interval,
                scheduler=order.scheduler,
                resolution=image.width,
                base=_short(loaded.base[0]),
                base_revision=loaded.base[1],
                adapter=None if plain else label,
                adapter_sha256=None if plain else loaded.adapter_sha256,
            )
            tell(
                Picture(
                    role,
                    _data_uri("png", finish(image, settings)),
                    settings,
                    as_a1111(settings),
                    order.animal.strip(),
                    loaded.device,
                )
            )

    def _prepare(self, order: Order, tell: Tell) -> tuple[Loaded, str, Usual]:
        """The pipeline with the adapter that the order names, the adapter's name, and how it usually draws."""
        from bestiary.diffusion.adapter import adapter_sha256, apply_adapter, remove
        from bestiary.registry import check_base, find_base

        if order.adapter == "none":
            loaded = self._load(self._base(order.base) or self.default_base, order.device, tell)
            remove(loaded.pipeline)
            loaded.adapter = None
            return loaded, "", self.usual
        offer = self.uploads.get(order.adapter)
        offer = offer or next((offer for offer in self.offers() if offer.key == order.adapter), None)
        if offer is None:
            raise RefusedError("gone", "This adapter is not here any more: choose another, or upload it again.")
        adapter = self._resolve(offer)
        base = self._base(order.base) or self.default_base
        # A stranger's file must not name a folder of this machine, or a download.
        if not order.base and adapter.base and offer.kind != "upload":
            base = find_base(adapter), adapter.base_revision
        loaded = self._load(base, order.device, tell)
        identity = (adapter.file, adapter.file.stat().st_mtime_ns)
        if loaded.adapter != identity:
            loaded.adapter = None
            if not order.base:
                check_base(adapter, base[0])
            apply_adapter(loaded.pipeline, adapter.file)
            loaded.adapter, loaded.adapter_sha256 = identity, adapter_sha256(adapter.file)
        return loaded, offer.key if offer.kind == "registry" else offer.label, offer.usual or self.usual

    def _resolve(self, offer: Offer) -> Adapter:
        from bestiary.registry import resolve

        if offer.kind != "registry":
            return resolve(offer.what)
        if offer.key not in self._resolved:  # a version never changes
            self._resolved[offer.key] = resolve(offer.what)
        return self._resolved[offer.key]

    @contextlib.contextmanager
    def _without_paths(self, names: Mapping[str, str] | None = None) -> Iterator[None]:
        """A stranger learns what things are called here, not where this machine keeps them."""
        try:
            yield
        except RefusedError:
            raise
        except BestiaryError as error:
            known = {str(adapter.file): key for key, adapter in self._resolved.items()}
            known |= {path: _short(path) for path in (*self.local, *(model for model, _ in self.bases.values()))}
            known |= {offer.what: offer.label for offer in self.uploads.values()} | dict(names or {})
            sentence = str(error)
            for path in sorted(known, key=len, reverse=True):
                sentence = sentence.replace(path, known[path])
            raise BestiaryError(sentence) from None

    def _base(self, key: str) -> tuple[str, str | None] | None:
        if key and key not in self.bases:
            raise RefusedError("noBase", "This base is not on offer here.")
        return self.bases.get(key)

    def _load(self, base: tuple[str, str | None], device: str, tell: Tell) -> Loaded:
        """The base in memory, in place of another one; loaded only when it is not there."""
        from bestiary.diffusion.base import device_and_dtype, load_pipeline

        best = device_and_dtype()[0].type
        device = device or best
        if device not in (best, "cpu"):
            raise RefusedError("noDevice", "There is no device {device} here.", device=device)
        if self._loaded is None or (self._loaded.base, self._loaded.device) != (base, device):
            tell(Loading())
            self._loaded = None  # room for the next one first
            self._loaded = Loaded(load_pipeline(*base, device=device), base, device)
        return self._loaded


@contextlib.contextmanager
def previews(pipeline: StableDiffusionPipeline, guidance_scale: float, show: Callable[[Image], None]) -> Iterator[None]:
    """While inside, show what the finished picture will be by the UNet's present guess: x0 of arXiv:2010.02502, eq. 9.

    Every sampler here gives the UNet latents of unit variance and their timestep, so that one formula serves all.
    Small pictures, a few a second, for at most a tenth of the time.
    """

    alphas = pipeline.scheduler.alphas_cumprod
    prediction_type = pipeline.scheduler.config.prediction_type
    next_time = 0.0

    def watch(_unet: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal next_time
        started = time.monotonic()
        if started < next_time:
            return
        latents, timestep = inputs[0][-1:], inputs[1]  # (1, C, h, w)
        prediction = output[0][-1:]
        if len(output[0]) == 2:  # classifier-free guidance: unconditional, conditional
            prediction = output[0][:1] + guidance_scale * (prediction - output[0][:1])
        alpha = alphas[int(timestep)].to(latents)
        if prediction_type == "epsilon":
            finished = (latents - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
        elif prediction_type == "v_prediction":
            finished = alpha.sqrt() * latents - (1 - alpha).sqrt() * prediction
        else:
            finished = prediction
        show(_decode_small(pipeline, finished))
        now = time.monotonic()
        next_time = now + max(PREVIEW_EVERY_SECONDS, (now - started) / PREVIEW_SHARE)

    hook = pipeline.unet.register_forward_hook(watch)
    try:
        yield
    finally:
        hook.remove()


def _decode_small(pipeline: StableDiffusionPipeline, latents: torch.Tensor) -> Image:
    import torch

    side = min(PREVIEW_SIDE, latents.shape[-1])
    small = torch.nn.functional.interpolate(latents, size=(side, side), mode="area")
    decoded = pipeline.vae.decode(small / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    image: Image = pipeline.image_processor.postprocess(decoded.detach(), output_type="pil")[0]
    return image


def native_side(base: str, revision: str | None) -> int:
    """The side in pixels of the pictures that a base was trained on."""
    from bestiary.diffusion.base import base_folder

    folder = base_folder(base, revision)
    try:
        unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
        return int(unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1))
    except (OSError, ValueError, KeyError, TypeError):
        raise BestiaryError(f"The base {base} is incomplete or broken: its configuration cannot be read.") from None


def _prompt(order: Order, template: str) -> tuple[str, Note | None]:
    """The prompt, and a note for somebody whose animal is none of the 100."""
    if order.prompt.strip():
        return " ".join(order.prompt.split()), None
    animal, near = find_subject(order.animal)
    return caption(animal, template), None if near is None else Note(animal.name, tuple(near))


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _short(model: str) -> str:
    """A base or a folder without the path to it: models/base, stable-diffusion-v1-5/stable-diffusion-v1-5."""
    return "/".join(Path(model).parts[-2:])


def _lower(text: str) -> str:
    return f"{text[0].lower()}{text[1:]}"
