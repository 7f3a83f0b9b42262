"""Finding the sites of any ``torch.nn.Module``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from finegraft.errors import SiteError
from finegraft.locate.blocks import Block, Blocks, numbered_ancestors
from finegraft.locate.collection import Sites
from finegraft.locate.coupling import coupled
from finegraft.locate.inputs import input_sites
from finegraft.locate.networks import network_sites
from finegraft.locate.ops import EMBEDDING, Op, op_for, tensor_op
from finegraft.locate.query import alike, expression
from finegraft.locate.roles import EXPERTS_SEGMENT, ROLES, role_of, telling_path
from finegraft.locate.site import Site
from finegraft.locate.sublayers import attention_calls, sublayers, whole_blocks
from finegraft.quantised.stored import logical_shape
from finegraft.registry import nearest

_NOT_THE_BASE = ("finegraft", "parametrizations")


def sites(model: nn.Module, *, roles: Mapping[str, str] | None = None) -> Sites:
    """All places where a model can change, in the order of its modules.

    Every parameter belongs to exactly one site, as its main tensor or its bias, or to an alias of one. First
    come layers and bare tensors, then the sublayers of each block, its attention calls, the inputs of stacks and whole
    stacks, which hold no parameter of their own. On a model that carries grafts, the sites are those of the base.

    Args:
        model: any module.
        roles: overrides, from a regular expression that is searched for in the names of layers and bare
            tensors to one of :data:`finegraft.locate.roles.ROLES`; later entries win.

    Raises:
        SiteError: an override names an unknown role or matches no site.

    Example:
        >>> from torch import nn
        >>> [(site.name, site.role) for site in sites(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))]
        [('0', 'other'), ('1', 'norm')]
    """
    modules = dict(_modules(model))
    found = _layers_and_tensors(modules)
    _infer_roles(found, modules)
    _override_roles(found, roles or {})
    blocks = Blocks((draft.full_name, draft.role) for draft in found)
    parts = coupled([draft.site(blocks.of(draft.full_name)) for draft in found], modules)
    taken = {site.name for site in parts}
    calls = list(attention_calls(parts, modules, blocks))
    taken.update(site.name for site in calls)
    spans = list(sublayers(parts, modules, taken))
    inputs = input_sites(parts, modules, taken)
    networks = network_sites(parts, spans, calls, modules)
    return Sites([*parts, *spans, *whole_blocks(parts, spans, modules), *calls, *inputs, *networks])


def exactly(name: str) -> str:
    """The regular expression that is found in this name and no other."""
    return rf"\A{re.escape(name)}\Z"


class _Holder(NamedTuple):
    """A module that holds a parameter under an attribute name."""

    path: str
    module: nn.Module
    attribute: str
    tensor: Tensor

    @property
    def name(self) -> str:
        return f"{self.path}.{self.attribute}" if self.path else self.attribute


@dataclass
class _Draft:
    """A layer or bare tensor whose role is still open."""

    holder: _Holder
    op: Op
    aliases: tuple[_Holder, ...]
    is_layer: bool
    role: str = "other"

    @property
    def full_name(self) -> str:
        return self.holder.path if self.is_layer else self.holder.name

    def site(self, block: Block | None) -> Site:
        return Site(
            name=self.full_name,
            kind="layer" if self.is_layer else "tensor",
            type=self.op.type,
            role=self.role,
            layer=block.index if block else None,
            module=self.holder.module,
            tensor=self.holder.attribute,
            op=self.op,
            shape=logical_shape(self.holder.tensor),
            aliases=tuple((alias.name, alias.module, alias.attribute) for alias in self.aliases),
            block=block.path if block else "",
            stack=block.stack if block else "",
        )


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules of the base, each module once, under the first of its names."""
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        seen.add(id(module))
        yield path, module
        for name, child in module._modules.items():
            if child is not None and name not in _NOT_THE_BASE and id(child) not in seen:
                yield from walk(f"{path}.{name}" if path else name, child)

    return walk("", model)


def _holders(modules: Mapping[str, nn.Module]) -> Iterator[_Holder]:
    for path, module in modules.items():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                yield _Holder(path, module, name, tensor)
        lists = module._modules.get("parametrizations")
        if isinstance(lists, nn.ModuleDict):
            yield from _parametrized(path, module, lists)


def _parametrized(path: str, module: nn.Module, lists: nn.ModuleDict) -> Iterator[_Holder]:
    """Parameters that ``torch.nn.utils.parametrize`` moved away; a single original keeps the name it had."""
    for name, steps in lists.items():
        for part, tensor in steps._parameters.items():
            if tensor is not None and part == "original":
                yield _Holder(path, module, name, tensor)
            elif tensor is not None:
                yield _Holder(".".join(filter(None, (path, "parametrizations", name))), steps, part, tensor)


def _layers_and_tensors(modules: Mapping[str, nn.Module]) -> list[_Draft]:
    """One draft per distinct parameter that is the main tensor of a layer or belongs to none."""
    ops = {id(module): None if _looks_up_otherwise(module) else op_for(module) for module in modules.values()}
    tied: dict[int, list[_Holder]] = {}
    for holder in _holders(modules):
        tied.setdefault(id(holder.tensor), []).append(holder)

    def rank(holder: _Holder) -> int:
        op = ops.get(id(holder.module))
        is_main = op is not None and holder.attribute == "weight"
        return 2 if not is_main else 0 if op is EMBEDDING else 1

    groups = [sorted(holders, key=rank) for holders in tied.values()]
    layers = {id(first.module) for first, *_ in groups if rank(first) < 2}

    def is_bias(holder: _Holder) -> bool:
        return id(holder.module) in layers and holder.attribute == "bias"

    drafts = []
    for first, *others in groups:
        is_layer = rank(first) < 2
        if not is_layer and (any(map(is_bias, [first, *others])) or not first.tensor.is_floating_point()):
            continue
        op = (ops[id(first.module)] if is_layer else None) or tensor_op(first.tensor)
        drafts.append(_Draft(first, op, tuple(others), is_layer))
    return drafts


def _looks_up_otherwise(module: nn.Module) -> bool:
    """Whether an embedding's input is not what it looks up, as in learned positions that are given token ids.

    No op knows such a lookup; as a bare tensor the table can be changed all the same.
    """
    if not isinstance(module, nn.Embedding) or hasattr(module, "embed_scale"):
        return False
    base = getattr(type(module), "_finegraft_base", type(module))
    return base.forward is not nn.Embedding.forward


def _infer_roles(drafts: list[_Draft], modules: Mapping[str, nn.Module]) -> None:
    experts = {path for path, module in modules.items() if any(map(EXPERTS_SEGMENT.match, module._modules))}
    for draft in drafts:
        path = draft.holder.path
        draft.role = role_of(
            path if draft.is_layer else telling_path(path, draft.holder.attribute),
            draft.op.type,
            in_block=any(True for _ in numbered_ancestors(path)),
            beside_experts=path.rpartition(".")[0] in experts,
        )


def _override_roles(drafts: list[_Draft], roles: Mapping[str, str]) -> None:
    names = [draft.full_name for draft in drafts]
    for pattern, role in roles.items():
        if role not in ROLES:
            raise SiteError(f"roles: {pattern!r} has the unknown role {role!r}; {nearest(role, list(ROLES))}")
        sought = expression(pattern, "roles")
        matched = [draft for draft in drafts if sought.search(draft.full_name)]
        if not matched:
            raise SiteError(f"roles: {pattern!r} matches no layer or bare tensor; {alike(pattern, names)}")
        for draft in matched:
            draft.role = role
