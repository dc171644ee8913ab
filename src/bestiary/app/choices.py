"""What a program chooses: an adapter by one of its names, and the settings of an order that are not the defaults."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bestiary.app.errors import InvalidError
from bestiary.app.offers import Offer, Offers
from bestiary.app.orders import Order
from bestiary.errors import shown
from bestiary.generation import defaults_of
from bestiary.png_metadata import lora_name
from bestiary.samplers import DEFAULT_DENOISE, SamplingChanges

MAX_RANDOM_SEED = 2**32


@dataclass(frozen=True)
class WeightedOffer:
    """An adapter that a program chose, and its weight; None: the weight of its evaluation, or 1 without one."""

    offer: Offer
    weight: float | None = None

    @property
    def applied_weight(self) -> float:
        """The weight to apply it with."""
        if self.weight is not None:
            return self.weight
        return self.offer.defaults.sampling.adapter_weight if self.offer.defaults else 1.0


@dataclass(frozen=True)
class Wanted:
    """What a program asks for, besides the adapters. Without a seed, one is chosen at random."""

    prompt: str
    changes: SamplingChanges
    seed: int | None = None
    count: int = 1
    base: str = ""  # empty: the adapter's base
    image: str = ""  # the key of an uploaded image to start from; empty: noise
    denoise: float = DEFAULT_DENOISE
    preview: bool = False  # the program may ask for previews while it waits


def make_order(offers: Offers, adapters: Sequence[WeightedOffer], wanted: Wanted) -> Order:
    """The order for these adapters (none: the base alone), with what is not `wanted` otherwise as the command draws it.

    Raises BestiaryError when it is more than anybody may order.
    """
    weights = [each.applied_weight for each in adapters]
    defaults = defaults_of([each.offer for each in adapters], weights) or offers.defaults
    sampling = wanted.changes.apply(defaults.sampling)
    values: dict[str, object] = {
        "prompt": wanted.prompt,
        "negative_prompt": sampling.negative_prompt,
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "guidance_interval": sampling.guidance_interval,
        "scheduler": sampling.sampler,
        "width": sampling.width,
        "height": sampling.height,
        "seed": secrets.randbelow(MAX_RANDOM_SEED) if wanted.seed is None else wanted.seed,
        "count": wanted.count,
        "base": wanted.base,
        "image": wanted.image,
        "denoise": wanted.denoise,
        "preview": wanted.preview,
    }
    if adapters:
        first, *others = adapters
        more = tuple({"adapter": each.offer.key, "weight": each.applied_weight} for each in others)
        values |= {"adapter": first.offer.key, "adapter_weight": first.applied_weight, "more_adapters": more}
    return Order.of(values)


def preferred(offers: Iterable[Offer]) -> Offer | None:
    """The default adapter: the champion, else the first; None when there is no adapter."""
    offers = list(offers)
    return next((offer for offer in offers if "champion" in offer.aliases), offers[0] if offers else None)


def model_names(offer: Offer) -> tuple[str, ...]:
    """The names of an adapter as a model: models:/bestiary/3, models:/bestiary@champion, or its folder or file."""
    if offer.kind != "registry":
        return (offer.label,)
    name = offer.key.rpartition("/")[0]
    return (offer.key, *(f"{name}@{alias}" for alias in offer.aliases))


def models(offers: Offers) -> dict[str, Offer | None]:
    """Everything that can be named as a model: adapters by all of their names, and bases (None)."""
    named: dict[str, Offer | None] = {}
    for offer in offers.listed():
        for name in model_names(offer):
            named.setdefault(name, offer)
    return named | {name: None for name in offers.bases if name not in named}


@dataclass(frozen=True)
class Lora:
    """An adapter as `<lora:name:weight>` names it: by its name or by one of its aliases."""

    name: str
    aliases: tuple[str, ...]
    offer: Offer


def loras(offers: Iterable[Offer]) -> list[Lora]:
    """The adapters with their names for prompts. A champion is also bestiary@champion, and bestiary alone."""
    found: dict[str, Lora] = {}
    for number, offer in enumerate(offers, 1):
        name = lora_name(offer.name)
        name = f"{name}-{number}" if name in found else name
        registered = offer.key.removeprefix("models:/").rpartition("/")[0]
        aliases = [f"{registered}@{alias}" for alias in offer.aliases]
        aliases += [registered] if "champion" in offer.aliases else []
        found[name] = Lora(name, tuple(aliases), offer)
    return list(found.values())


def by_name(known: Iterable[Lora]) -> dict[str, Lora]:
    """The adapters by name and by alias; where two are alike, the name counts."""
    known = list(known)
    return {alias: lora for lora in known for alias in lora.aliases} | {lora.name: lora for lora in known}


def named(name: str, names: Mapping[str, object], what: str, field: str | None = None) -> str:
    """This name. Raises InvalidError, with the names that exist, when it is none of them."""
    if name not in names:
        raise InvalidError(
            f"There is no {what} {shown(name)} here. Choose one of {', '.join(names) or 'none'}.", 404, field
        )
    return name
