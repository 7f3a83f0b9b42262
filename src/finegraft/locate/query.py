"""The language of ``where``: elements that fit sites, and errors for those that fit none."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from finegraft.errors import NothingFits, SiteError
from finegraft.locate.site import Site

Wanted: TypeAlias = str | int | Sequence[str | int] | None
Fits: TypeAlias = Callable[[Site], bool]

_PARAMETER_KINDS = frozenset({"layer", "tensor"})
_KIND_OF_WORD = {
    "attn": "sublayer",
    "ffn": "sublayer",
    "sublayer": "sublayer",
    "block": "block",
    "network": "network",
    "encoder": "network",
    "attention": "attention",
    "input": "input",
    "decoder_input": "input",
}
_LAYER_FORMS = "an index such as 3, a range such as '0-3', 'first:2', 'last:2', 'first:50%', 'even' or 'odd'"
_LAYERS = re.compile(r"(?P<low>\d{1,9})(-(?P<high>\d{1,9}))?|(?P<end>first|last):(?P<count>\d{1,9})(?P<share>%)?")


@dataclass(frozen=True)
class Element:
    """One element of an argument of ``where``."""

    axis: str
    text: str
    fits: Fits
    excludes: bool
    optional: bool

    def __str__(self) -> str:
        return f"{self.axis} {'!' * self.excludes + self.text!r}"


def depths(sites: Iterable[Site]) -> dict[str, int]:
    """Number of blocks of each stack."""
    found: dict[str, int] = {}
    for site in sites:
        if site.layer is not None:
            found[site.stack] = max(found.get(site.stack, 0), site.layer + 1)
    return found


def depths_below_head(sites: Sequence[Site]) -> dict[str, int]:
    """How far below the head a site is, by name: the highest block 1, the lowest ``L``, embeddings ``L + 1``.

    Each stack counts from its own end. What lies outside of blocks counts with the embeddings where the model has it
    before its first block, such as a norm of the embeddings, and else is at 0, such as the last norm or a pooler.
    """
    blocks, found = depths(sites), {}
    first = next((i for i, site in enumerate(sites) if site.layer is not None), 0)
    for i, site in enumerate(sites):
        outside = max(blocks.values(), default=0) + 1 if site.role == "embed" or i < first else 0
        found[site.name] = outside if site.layer is None else blocks[site.stack] - site.layer
    return found


def select(sites: Sequence[Site], wanted: Mapping[str, Wanted], depths: Mapping[str, int]) -> list[Site]:
    """The sites that fit every argument; see :meth:`finegraft.locate.Sites.where`."""
    axes = {axis: _elements(axis, value, depths) for axis, value in wanted.items() if value is not None}
    pool = _pool(sites, axes)
    chosen = [site for site in pool if all(_fit(site, elements) for elements in axes.values())]
    for elements in axes.values():
        _require_each(elements, pool, sites, among="")
    for axis, elements in axes.items():
        others = [rest for name, rest in axes.items() if name != axis]
        left = [site for site in pool if all(_fit(site, rest) for rest in others)]
        if left:
            _require_each(elements, left, sites, among=" among the sites that the other arguments leave")
    if not chosen:
        together = " all together" if len(axes) > 1 else ""
        raise NothingFits(f"no site fits {_written(wanted)}{together}; {existing(pool)}")
    return chosen


def _require_each(elements: Sequence[Element], left: Sequence[Site], sites: Sequence[Site], *, among: str) -> None:
    for element in elements:
        if not element.optional and not any(map(element.fits, left)):
            raise NothingFits(_nothing_fits(element, left, sites, among))


def existing(sites: Sequence[Site]) -> str:
    """What there is to choose from: kinds of roles with counts, and the range of layers."""
    if not sites:
        return "there are no sites to choose from"
    roles = ", ".join(f"{role} ({count})" for role, count in Counter(site.role for site in sites).items())
    layers = sorted({site.layer for site in sites if site.layer is not None})
    numbered = f"layers {layers[0]}-{layers[-1]}" if layers else "no numbered layers"
    return f"there are the roles {roles}; {numbered}"


def similar(name: str, sites: Sequence[Site]) -> str:
    """The names most like this one, or the site that holds the tensor under another name."""
    for site in sites:
        if any(name in (alias, alias.rpartition(".")[0]) for alias, _, _ in site.aliases):
            return f"it shares its tensor with {site.name!r}, which is the site"
    return alike(name, [site.name for site in sites])


def alike(name: str, names: Sequence[str]) -> str:
    """The three names most like this one, or the first three."""
    close = difflib.get_close_matches(name.removeprefix("re:"), names, n=3, cutoff=0.3) or names[:3]
    return f"names like it: {', '.join(close)}"


def _elements(axis: str, value: Wanted, depths: Mapping[str, int]) -> list[Element]:
    values = [value] if isinstance(value, (str, int)) else list(value or ())
    if not values:
        raise SiteError(f"where: {axis} is an empty list; leave it out or name what should fit")
    elements = []
    for item in values:
        text = _text(axis, item)
        excludes, optional = text.startswith("!"), text.endswith("?")
        text = text.removeprefix("!").removesuffix("?")
        fits = _layer(text, depths) if axis == "layer" else _name(text) if axis == "name" else _is(axis, text)
        elements.append(Element(axis, text, fits, excludes, optional))
        if axis == "layer" and not (excludes or optional):
            _require_as_many(text, depths)
    return elements


def _text(axis: str, item: str | int) -> str:
    try:
        return str(item)
    except ValueError:  # Python writes out no whole number of more than 4300 digits
        raise SiteError(f"{axis} is a number of thousands of digits; give {_LAYER_FORMS}") from None


def _is(axis: str, text: str) -> Fits:
    return lambda site: getattr(site, axis) == text


def _name(text: str) -> Fits:
    if not text.startswith("re:"):
        return lambda site: fnmatch.fnmatchcase(site.name, text)
    pattern = expression(text[3:], "name")
    return lambda site: pattern.search(site.name) is not None


def expression(text: str, what: str) -> re.Pattern[str]:
    """A regular expression that the user wrote; ``what`` names the argument it stands in."""
    try:
        return re.compile(text)
    except re.error as error:
        raise SiteError(f"{what}: {text!r} is not a valid regular expression: {error}") from None


def _layer(text: str, depths: Mapping[str, int]) -> Fits:
    if text in ("even", "odd"):
        return lambda site: site.layer is not None and site.layer % 2 == (text == "odd")
    form = _LAYERS.fullmatch(text)
    if form is None:
        shown = repr(text if len(text) < 60 else f"{text[:60]}...")
        raise SiteError(f"layer {shown} is not understood; give {_LAYER_FORMS}")
    if form["end"]:
        counts = {stack: _count(form, depth) for stack, depth in depths.items()}
        start = {stack: depth - counts[stack] if form["end"] == "last" else 0 for stack, depth in depths.items()}
        return lambda site: site.layer is not None and 0 <= site.layer - start[site.stack] < counts[site.stack]
    low, high = int(form["low"]), int(form["high"] or form["low"])
    if high < low:
        raise SiteError(f"layer {text!r} runs backwards; give '{high}-{low}'")
    return lambda site: site.layer is not None and low <= site.layer <= high


def _count(form: re.Match[str], depth: int) -> int:
    """How many blocks of a stack are meant; a share is rounded down, but is one at least."""
    count = int(form["count"])
    if not form["share"]:
        return count
    if not 0 < count <= 100:
        raise SiteError(f"layer {form[0]!r} is no share; give one from 1% to 100%")
    return max(1, count * depth // 100)


def _require_as_many(text: str, depths: Mapping[str, int]) -> None:
    """Raise where ``first:N`` or ``last:N`` asks for more blocks than the deepest stack has."""
    form, deepest = _LAYERS.fullmatch(text), max(depths.values(), default=0)
    if form and form["end"] and deepest and _count(form, deepest) > deepest:
        raise NothingFits(
            f"layer {text!r} asks for {int(form['count'])} blocks; the deepest stack has {deepest}. "
            f"Give '{form['end']}:{deepest}', or leave layer out"
        )


def _pool(sites: Sequence[Site], axes: Mapping[str, list[Element]]) -> list[Site]:
    """Sites of the kinds asked for: layers and tensors unless a kind, role or type names others."""
    if "kind" in axes:
        return list(sites)
    words = [e.text for axis in ("role", "type") for e in axes.get(axis, ()) if not e.excludes]
    kinds = _PARAMETER_KINDS | {_KIND_OF_WORD[word] for word in words if word in _KIND_OF_WORD}
    return [site for site in sites if site.kind in kinds]


def _fit(site: Site, elements: Sequence[Element]) -> bool:
    wanted = [element for element in elements if not element.excludes]
    unwanted = [element for element in elements if element.excludes]
    return (not wanted or any(e.fits(site) for e in wanted)) and not any(e.fits(site) for e in unwanted)


def _nothing_fits(element: Element, left: Sequence[Site], sites: Sequence[Site], among: str) -> str:
    other_kinds = sorted({site.kind for site in sites if element.fits(site)} - {site.kind for site in left})
    if other_kinds and element.axis == "name":
        kinds = " or ".join(f"kind={kind!r}" for kind in other_kinds)
        return f"{element} fits no layer or tensor{among}; give {kinds} to reach what it does fit"
    if element.axis == "name":
        return f"{element} fits no site{among}; {similar(element.text, left or sites)}"
    if element.axis in ("type", "kind"):
        counts = Counter(getattr(site, element.axis) for site in left)
        listing = ", ".join(f"{value} ({count})" for value, count in counts.items()) or "none"
        return f"{element} fits no site{among}; there are the {element.axis}s {listing}"
    return f"{element} fits no site{among}; {existing(left)}"


def _written(wanted: Mapping[str, Wanted]) -> str:
    given = [f"{axis}={value!r}" for axis, value in wanted.items() if value is not None]
    return ", ".join(given) or "an empty query"
