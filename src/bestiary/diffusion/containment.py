"""Which adapters an adapter contains, by the provenance in its file, so that no change is applied twice.

A few-step adapter contains the adapter that it was distilled from, and a merged one contains its parents. Provenance
names them by their hashes, so a copy in another format is known by the hashes of the files in all formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from bestiary.diffusion.adapter_format import CONTAINS, AdapterContent
from bestiary.diffusion.conversion import hashes_of_formats
from bestiary.errors import BestiaryError

HASHES = ("adapter_sha256", "few_step_sha256")  # keys of a source; the second is of `distill.from`


@dataclass(frozen=True)
class Named:
    """An adapter to combine with others: its name for errors, and hashes that tell whether it would count twice.

    `hashes` are the SHA-256 of its file and of its copies in other formats, `contained` those of the adapters in it.
    """

    name: str
    hashes: frozenset[str]
    contained: frozenset[str]

    @staticmethod
    def of(name: str, sha256: str, content: AdapterContent) -> Named:
        """The adapter with this content in a file with this SHA-256."""
        return Named(name, hashes_of_formats(content) | {sha256}, contained(content))


def contained(content: AdapterContent) -> frozenset[str]:
    """The SHA-256 of the adapters whose changes are part of this one, according to its file.

    >>> from bestiary.diffusion.adapter_format import AdapterConfig, Provenance
    >>> provenance = Provenance.model_validate({"merged_from": [{"adapter_sha256": "a"}, {"adapter_sha256": "b"}]})
    >>> sorted(contained(AdapterContent({}, AdapterConfig(r=1, lora_alpha=1, target_modules=[]), provenance)))
    ['a', 'b']
    """
    return frozenset(_contained(content))


def check_given_once(adapters: Sequence[Named]) -> None:
    """Raise BestiaryError when two of the adapters are the same, in whatever formats."""
    for first, second in combinations(adapters, 2):
        if first.hashes & second.hashes:
            raise BestiaryError(f"{first.name} and {second.name} are the same adapter. Name it once, with one weight.")


def check_counted_once(adapters: Sequence[Named]) -> None:
    """Raise BestiaryError when one of the adapters contains another one, or two contain the same."""
    for first, second in combinations(adapters, 2):
        if first.hashes & second.hashes:  # the caller handles an adapter that is given twice
            continue
        for outer, inner in ((first, second), (second, first)):
            if inner.hashes & outer.contained:
                raise BestiaryError(
                    f"{outer.name} already contains {inner.name}, which would count twice. Leave out {inner.name}."
                )
        if first.contained & second.contained:
            raise BestiaryError(
                f"{first.name} and {second.name} contain the same adapter, which would count twice. Leave out one of "
                "them."
            )


def _contained(content: AdapterContent) -> Iterator[str]:
    facts = content.provenance.model_extra or {}  # anybody can write such a file
    # The LoRA that `distill` trains, before the adapter is added to it, names the same source but does not contain it.
    # Only the combined file has few-step settings.
    sources: list[object] = [facts.get("distilled_from")] if content.few_step else []
    for key in ("merged_from", CONTAINS):
        found = facts.get(key)
        sources += found if isinstance(found, list) else []
    for source in sources:
        hashes = [source.get(key) for key in HASHES] if isinstance(source, dict) else [source]
        yield from (sha256 for sha256 in hashes if isinstance(sha256, str))
