"""What a browser may order: a typed order, validated before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from bestiary import samplers
from bestiary.app.errors import InvalidError, RefusedError
from bestiary.params import rising
from bestiary.samplers import DEFAULT_DENOISE, MAX_ADAPTER_WEIGHT, MAX_ADAPTERS, Decoder, SamplerName, SamplingChanges

MAX_SIDE, SIDE_STEP = 1024, 64  # pixels a side of a square picture; other shapes have at most as many pixels
MAX_WORK = 500_000_000  # pixels x steps of one order: 16 pairs of 512 x 512 pixels in 50 steps are 419 million
Side = Annotated[int, Field(multiple_of=samplers.SIDE_STEP, ge=32, le=2 * MAX_SIDE)]
Weight = Annotated[float, Field(ge=0, le=MAX_ADAPTER_WEIGHT)]
NoiseLevel = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Request = TypeVar("Request", bound=BaseModel)


class WeightedKey(BaseModel):
    """An adapter by its key in the page's catalog, and its weight."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    adapter: str
    weight: Weight = 1.0


class Order(BaseModel):
    """What a browser asks for. Adapter, base and device are keys of what the page's catalog offers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    adapter: str = "none"
    adapter_weight: Weight = 1.0
    more_adapters: tuple[WeightedKey, ...] = Field(default=(), max_length=MAX_ADAPTERS - 1)  # in addition to the first
    base: str = ""  # empty: the adapter's base
    device: str = ""  # empty: the best one
    animal: str = Field(default="", max_length=200)
    prompt: str = Field(default="", max_length=1000)  # replaces the sentence around the animal
    negative_prompt: str = Field(default="", max_length=1000)
    steps: int = Field(ge=1, le=400)
    guidance_scale: float = Field(ge=1, le=20)
    guidance_interval: Annotated[tuple[NoiseLevel, NoiseLevel], AfterValidator(rising)] | None = None
    scheduler: SamplerName
    seed: int = Field(ge=0, lt=2**53)  # larger integers are not exact in a browser
    count: int = Field(default=1, ge=1, le=16)
    width: Side | None = None  # None: the base's
    height: Side | None = None
    image: str = ""  # the key of an uploaded image to start from; empty: noise
    denoise: float = Field(default=DEFAULT_DENOISE, gt=0, le=1)
    decoder: Decoder | None = None  # None: the decoder of the adapter's evaluation
    compare: bool = False  # also draw the base with each seed; beside a few-step adapter, with its defaults
    preview: bool = True

    @staticmethod
    def parse(data: bytes) -> Order:
        """Parse a request's body. Raises BestiaryError that names what is wrong with it."""
        return parsed(Order, data).checked()

    @staticmethod
    def of(values: Mapping[str, object]) -> Order:
        """The order with these values. Raises BestiaryError that names what is wrong with them."""
        try:
            return Order.model_validate(values).checked()
        except ValidationError as error:
            raise _invalid(error) from None

    def checked(self) -> Order:
        """This order. Raises BestiaryError when it names nothing to draw, or is too much work."""
        if not (self.animal.strip() or self.prompt.strip()):
            raise RefusedError("missing", "Name an animal, or write a prompt.")
        self.check_work(self.width or SIDE_STEP, self.height or SIDE_STEP)
        return self

    def check_work(self, width: int, height: int, base_steps: int | None = None) -> None:
        """Raise BestiaryError when a picture of this size is too large, or all of the order would take too long.

        `base_steps`: the steps of each picture of the base; None: as many as with the adapter.
        """
        side = f"{width}" if width == height else f"{width} x {height}"
        if width * height > MAX_SIDE**2:
            raise RefusedError(
                "tooManyPixels",
                "{side} px are too many for one picture: {limit} x {limit} are the most. Choose a smaller size.",
                side=side,
                limit=str(MAX_SIDE),
            )
        both = self.steps + ((base_steps or self.steps) if self.compare else 0)
        steps, limit = both * self.count, MAX_WORK // (width * height)
        if steps > limit:
            raise RefusedError(
                "tooMuchWork",
                "All pictures of an order may take {limit} steps together at {side} px, and these take {steps}. Choose "
                "fewer pictures, fewer steps or a smaller size.",
                limit=str(limit),
                side=side,
                steps=str(steps),
            )

    @property
    def adapters(self) -> tuple[WeightedKey, ...]:
        """Every adapter to draw with; none for the base alone."""
        first = WeightedKey(adapter=self.adapter, weight=self.adapter_weight)
        return tuple(each for each in (first, *self.more_adapters) if each.adapter != "none")

    @property
    def drawn_steps(self) -> int:
        """How many steps each picture takes: fewer if it starts from an image."""
        return samplers.denoising_steps(self.steps, self.denoise) if self.image else self.steps

    @property
    def changes(self) -> SamplingChanges:
        """The ordered sampling."""
        return SamplingChanges(
            sampler=self.scheduler,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            width=self.width,
            height=self.height,
            negative_prompt=" ".join(self.negative_prompt.split()),
            adapter_weight=self.adapter_weight,
            decoder=self.decoder,
        )


def parsed(kind: type[Request], data: bytes) -> Request:
    """A request's body as this type. Raises InvalidError that names the first field that is wrong."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _invalid(error) from None


def _invalid(error: ValidationError) -> InvalidError:
    first = error.errors(include_url=False)[0]
    where = " ".join(str(part).replace("_", " ") for part in first["loc"]) or "this request"
    given = repr(first["input"])
    shown = f", not {given}" if len(given) < 40 else ""
    field = str(first["loc"][0]) if first["loc"] else None
    return InvalidError(f"{where[0].upper()}{where[1:]}: {_lower_first(first['msg'])}{shown}.", field=field)


def _lower_first(text: str) -> str:
    return f"{text[0].lower()}{text[1:]}"
