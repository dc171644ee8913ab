"""What a browser may order: a typed order, validated before anything is drawn."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from bestiary.app.errors import RefusedError
from bestiary.errors import BestiaryError
from bestiary.params import rising
from bestiary.samplers import SamplerName, SamplingChanges

MAX_SIDE, SIDE_STEP = 1024, 64  # pixels
MAX_WORK = 500_000_000  # of one order, in pixels x steps: 16 pairs of 512 x 512 pixels in 50 steps are 419 million
NoiseLevel = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Order(BaseModel):
    """What a browser asks for. Adapter, base and device are keys of what the page's catalog offers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    adapter: str = "none"
    base: str = ""  # empty: the one that the adapter was trained on
    device: str = ""  # empty: the best one
    animal: str = Field(default="", max_length=200)
    prompt: str = Field(default="", max_length=1000)  # replaces the sentence around the animal
    steps: int = Field(ge=1, le=400)
    guidance_scale: float = Field(ge=1, le=20)
    guidance_interval: Annotated[tuple[NoiseLevel, NoiseLevel], AfterValidator(rising)] | None = None
    scheduler: SamplerName
    seed: int = Field(ge=0, lt=2**53)  # larger integers are not exact in a browser
    count: int = Field(default=1, ge=1, le=16)
    resolution: int | None = Field(default=None, multiple_of=SIDE_STEP, ge=SIDE_STEP, le=MAX_SIDE)  # None: base's
    compare: bool = False  # also draw the base's picture of each seed
    preview: bool = True

    @staticmethod
    def parse(data: bytes) -> Order:
        """Parse a request's body. Raises BestiaryError that names what is wrong with it."""
        try:
            order = Order.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = " ".join(str(part).replace("_", " ") for part in first["loc"]) or "this request"
            given = repr(first["input"])
            shown = f", not {given}" if len(given) < 40 else ""
            raise BestiaryError(f"{where[0].upper()}{where[1:]}: {_lower_first(first['msg'])}{shown}.") from None
        if not (order.animal.strip() or order.prompt.strip()):
            raise RefusedError("missing", "Name an animal, or write a prompt.")
        order.check_work(order.resolution or SIDE_STEP)
        return order

    def check_work(self, side: int) -> None:
        """Raise BestiaryError when the order's pictures, `side` pixels wide and high, would take too long together."""
        steps, limit = self.steps * self.count * (2 if self.compare else 1), MAX_WORK // side**2
        if steps > limit:
            raise RefusedError(
                "tooMuchWork",
                "All pictures of an order may take {limit} steps together at {side} px, and these take {steps}. Choose "
                "fewer pictures, fewer steps or a smaller size.",
                limit=str(limit),
                side=str(side),
                steps=str(steps),
            )

    @property
    def changes(self) -> SamplingChanges:
        """What the order says of the sampling."""
        return SamplingChanges(
            sampler=self.scheduler,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            width=self.resolution,
            height=self.resolution,
        )


def _lower_first(text: str) -> str:
    return f"{text[0].lower()}{text[1:]}"
