"""Draws what the page orders, one order at a time. It knows nothing of the web: events go out through a callback."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING

from bestiary.app.choices import preferred
from bestiary.app.errors import RefusedError, Stopped
from bestiary.app.events import Event, Loading, Note, Picture, Preview, Progress, Role
from bestiary.app.offers import Offer, Offerings, Offers, gone, short_name
from bestiary.app.orders import MAX_SIDE, SIDE_STEP, Order
from bestiary.engine_choice import Wish, choose_engine
from bestiary.errors import BestiaryError
from bestiary.generation import Base, Generator, choose_base, decisive, defaults_of
from bestiary.png_metadata import AppliedAdapter, PictureSettings, StartImage, as_a1111, write_png
from bestiary.samplers import SAMPLERS, Sampling, SamplingChanges
from bestiary.subjects import ANIMALS, Subject, caption, find_subject

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image

    from bestiary.registry.resolving import Adapter

Tell = Callable[[Event], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One picture of an order."""

    settings: PictureSettings
    role: Role


@dataclass(frozen=True)
class Chosen:
    """An adapter that an order names, and its weight."""

    offer: Offer
    adapter: Adapter
    weight: float


@dataclass(frozen=True)
class Work:
    """The adapters, base and settings of an order. The hashes of the adapters are empty until they have been loaded."""

    base: Base
    chosen: tuple[Chosen, ...] = ()
    device: str = ""  # empty: the best one
    any_base: bool = False  # the user chose the base, so it may differ from the adapters' base
    hashes: tuple[str, ...] = ()
    start: StartImage | None = None
    image: Image | None = None  # image to start from; None: noise

    @property
    def adapters(self) -> list[Adapter]:
        return [each.adapter for each in self.chosen]

    @property
    def applied(self) -> list[AppliedAdapter]:
        """The adapters as the picture's settings name them."""
        return [
            AppliedAdapter(each.offer.name, sha256, each.weight)
            for each, sha256 in zip(self.chosen, self.hashes, strict=True)
        ]


class Studio:
    """Draws one order at a time: call `draw` from one thread only."""

    def __init__(self, offerings: Offerings) -> None:
        self.offers = Offers(offerings)
        self._generator = Generator(offerings.tiny_decoder)

    def catalog(self) -> dict[str, object]:
        """Everything that the page offers, and its initial choices, ready for JSON."""
        from bestiary.diffusion.base import device_and_dtype

        offers = self.offers.listed()
        with self.offers.without_paths():
            own = native_side(self.offers.default_base)
        best = device_and_dtype()[0].type
        usual = preferred(offers)
        return {
            "animals": [{"folder": a.folder, "name": a.name, "chinese": a.chinese} for a in ANIMALS],
            "adapters": [offer.public() for offer in offers],
            "bases": list(self.offers.bases),
            "devices": list(dict.fromkeys([best, "cpu"])),
            "schedulers": {name: sampler.label for name, sampler in SAMPLERS.items()},
            "resolutions": sorted({own, *range(min(own, 256), MAX_SIDE + 1, SIDE_STEP)}),
            "adapter": usual.key if usual else "none",
            "usual": self.offers.defaults.to_dict() | {"resolution": own},
        }

    def warm(self) -> None:
        """Load the default base, so that the first picture does not wait for it."""
        try:
            self._load(Work(self.offers.default_base), lambda _: None)
        except BestiaryError as error:
            log.warning("%s", error)

    def draw(
        self,
        order: Order,
        tell: Tell,
        stopped: threading.Event,
        wants_preview: Callable[[], bool] = lambda: True,
    ) -> Iterator[None]:
        """Draw the order and report loading, progress, previews and pictures to `tell`. Yields after each picture.

        Another order may be drawn between two pictures. An order with previews has them while `wants_preview` says so.
        Raises BestiaryError for what cannot be drawn, Stopped soon after `stopped` is set.
        """
        from bestiary.diffusion.previews import previews

        def check() -> None:
            if stopped.is_set():
                raise Stopped

        check()
        with self.offers.without_paths():
            work = self._prepare(order, tell)
            jobs = self._jobs(order, work, tell)
        started = time.monotonic()
        total = sum(job.settings.drawn_steps for job in jobs)
        for position, job in enumerate(jobs):
            check()
            with self.offers.without_paths():
                self._load(work, tell)

            drawn = sum(earlier.settings.drawn_steps for earlier in jobs[:position])

            def progress(done: int, _: int, before: int = drawn) -> None:
                check()
                left = (time.monotonic() - started) / (before + done) * (total - before - done)
                tell(Progress(before + done, total, round(left, 1)))

            def show(image: Image, role: Role = job.role) -> None:
                tell(Preview(role, _data_uri("jpeg", _jpeg(image))))

            pipeline = self._generator.pipeline
            watching = (
                previews(pipeline, job.settings.sampling.guidance_scale, show, wants_preview)
                if order.preview
                else contextlib.nullcontext()
            )
            with self.offers.without_paths(), stoppable(pipeline, check), watching:
                image = self._generator.draw(job.settings, progress, work.image)
            tell(
                Picture(
                    role=job.role,
                    image=_data_uri("png", write_png(image, job.settings)),
                    settings=job.settings.to_dict(),
                    parameters=as_a1111(job.settings),
                    animal="" if order.prompt.strip() else order.animal.strip(),
                    device=self._generator.device,
                )
            )
            yield

    def _prepare(self, order: Order, tell: Tell) -> Work:
        """Find and load what the order needs."""
        offers = [(self.offers.find(each.adapter), each.weight) for each in order.adapters]
        chosen = tuple(Chosen(offer, self.offers.resolve(offer), weight) for offer, weight in offers)
        _check_export(order, chosen)
        trusted = [each.adapter for each in chosen if each.offer.kind != "upload"]
        base = choose_base(
            decisive(trusted or [each.adapter for each in chosen]),
            self.offers.base(order.base),
            self.offers.default_base,
            trusted=bool(trusted),
            known=self.offers.bases.values(),
        )
        start, image = self.offers.start_image(order.image, order.denoise) if order.image else (None, None)
        work = Work(base, chosen, order.device, any_base=bool(order.base), start=start, image=image)
        self._load(work, tell)
        return replace(work, hashes=self._generator.adapter_hashes)

    def _jobs(self, order: Order, work: Work, tell: Tell) -> list[Job]:
        """The order's pictures. What `_prepare` loaded must still be there."""
        base, offers = work.base, [each.offer for each in work.chosen]
        defaults = (offers and offers[0].defaults) or self.offers.defaults
        taught = [subject for offer in offers for subject in offer.subjects or ()]
        prompt, note = _prompt(order, defaults.template, taught)
        if note:
            tell(note)
        # The order sets everything else. A few-step adapter draws at its own timesteps.
        usual = defaults_of(offers, [each.weight for each in work.chosen])
        sampling = Sampling(
            guidance_interval=order.guidance_interval,
            timesteps=usual.sampling.timesteps if usual else None,
            decoder=usual.sampling.decoder if usual else "full",
        )
        sampling = self._generator.sized(order.changes.apply(sampling))
        of_base = self._sampling_of_base(work, sampling)
        order.check_work(sampling.width or SIDE_STEP, sampling.height or SIDE_STEP, of_base.steps)
        plain = PictureSettings(
            prompt="",
            seed=order.seed,
            sampling=of_base,
            base=short_name(base.model),
            base_revision=base.revision,
            adapter=None,
            adapter_sha256=None,
            start=work.start,
            engine=self._generator.export.engine if self._generator.export else "torch",
            export_sha256=self._generator.export.sha256 if self._generator.export else None,
        )
        plain = self._generator.prompted(plain, prompt, literal=not order.prompt.strip())
        adapted = plain
        if applied := work.applied:
            first, *others = applied
            adapted = replace(
                plain,
                sampling=replace(sampling, adapter_weight=first.weight),
                adapter=first.adapter,
                adapter_sha256=first.adapter_sha256,
                more_adapters=tuple(others),
            )
        pairs: list[tuple[PictureSettings, Role]] = [(adapted, "adapter")]
        if order.compare and applied:
            pairs.append((plain, "base"))
        return [
            Job(replace(settings, seed=order.seed + number), role)
            for number in range(order.count)
            for settings, role in pairs
        ]

    def _sampling_of_base(self, work: Work, sampling: Sampling) -> Sampling:
        """The sampling of the base beside pictures with this one: the same, or its defaults beside a few-step adapter.

        In the few steps of such an adapter and without guidance, the base would draw nothing recognisable.
        """
        sampling = replace(sampling, adapter_weight=1.0)  # the base alone has no adapter weight
        if not any(each.offer.few_step and each.weight for each in work.chosen):
            return sampling
        return sampling.in_steps_of(self.offers.defaults.sampling)

    def _load(self, work: Work, tell: Tell) -> None:
        """Load the order's base and adapters, unless they are in memory."""
        from bestiary.diffusion.base import device_and_dtype

        best = device_and_dtype()[0].type
        device = work.device or best
        if device not in (best, "cpu"):
            raise RefusedError("noDevice", "There is no device {device} here.", device=device)
        if not self._generator.is_loaded(work.base, device) and not self._generator.has_open(work.adapters):
            tell(Loading())
        try:
            self._generator.prepare(work.base, work.adapters, device, any_base=work.any_base)
        except FileNotFoundError:
            if all(adapter.file.exists() for adapter in work.adapters):
                raise
            raise gone() from None  # a newer upload has taken its place
        if work.hashes and self._generator.adapter_hashes != work.hashes:
            raise gone()  # the file has changed since the order arrived


@contextlib.contextmanager
def stoppable(pipeline: StableDiffusionPipeline, check: Callable[[], None]) -> Iterator[None]:
    """Inside, call `check` before every block of the UNet and of the decoder. An exception in it stops the drawing."""
    from bestiary.diffusion.engines import is_exported

    unet, decoder = pipeline.unet, pipeline.vae.decoder
    if is_exported(pipeline):  # OpenVINO runs each network as one block
        blocks = [unet, decoder]
    else:
        blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks, *getattr(decoder, "up_blocks", ())]
    hooks = [block.register_forward_pre_hook(lambda *_: check()) for block in blocks if block is not None]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_export(order: Order, chosen: Sequence[Chosen]) -> None:
    """Raise BestiaryError when the order names an export and asks for something that the export cannot draw."""
    wish = Wish(
        changes=SamplingChanges(decoder=order.decoder),
        has_image=bool(order.image),
        weighted=any(each.weight != 1 for each in chosen),
        base=order.base,
        device=order.device,
    )
    chosen_engine, _ = choose_engine([each.adapter for each in chosen], wish)
    if order.compare and any(adapter.is_export for adapter in chosen_engine):
        raise BestiaryError("An export cannot draw without its adapter. Turn off the comparison with the base.")


def native_side(base: Base) -> int:
    """Pixels a side of the pictures that a base was trained on, read from its configuration."""
    from bestiary.diffusion.base import base_folder

    folder = base_folder(base.model, base.revision)
    try:
        unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
        return int(unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1))
    except (OSError, ValueError, KeyError, TypeError):
        raise BestiaryError(f"The base {base.model} is incomplete or damaged: its config cannot be read.") from None


def _prompt(order: Order, template: str, taught: Iterable[Subject]) -> tuple[str, Note | None]:
    """The prompt, and a note when the name is neither a subject of the adapter nor one of the 100 animals."""
    if order.prompt.strip():
        return " ".join(order.prompt.split()), None
    subject, similar = find_subject(order.animal, taught)
    return caption(subject, template), None if similar is None else Note(subject.name, tuple(similar))


def _jpeg(image: Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
