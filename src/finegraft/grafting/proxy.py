"""Proxy tuning: a large model decodes with what tuning changed in a small one (Liu et al. 2024, arXiv:2401.08565)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from finegraft.errors import RecipeError
from finegraft.grafting.graft import Graft

Scores = Float[Tensor, "batch vocabulary"]


def proxy(base: nn.Module, small: Graft | tuple[nn.Module, nn.Module], *, strength: float = 1.0) -> Proxy:
    """A model whose logits are ``base + strength * (tuned - untuned)``; nothing is trained or changed.

    Args:
        base: the large model; it may carry grafts of its own.
        small: a graft on a small model, which is run with and without it; or a tuned and an untuned small model.
        strength: 0 is the base alone.

    Raises:
        RecipeError: a merged or disabled graft, a strength that is no finite number, or models whose logits are not for
            the same number of tokens or classes.

    Example:
        ``fg.proxy(large, fg.load("runs/small/graft", small)).generate(**inputs, max_new_tokens=20)``
    """
    if not isinstance(base, nn.Module):
        raise RecipeError(f"proxy takes the large model, a torch.nn.Module, not a {type(base).__name__}")
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength):
        raise RecipeError(f"strength is a finite number, not {strength!r}")
    return Proxy(base, *_pair(small), strength=float(strength))


Run = Callable[..., Any]


def _pair(small: Any) -> tuple[nn.Module, nn.Module, Graft | None]:
    if isinstance(small, Graft):
        if small.merged:
            raise RecipeError(f"{small!r} is merged, so the small model does not run without it: call unmerge() first")
        if not small.enabled:
            raise RecipeError(f"{small!r} is disabled, so there is no change to add: set enabled = True first")
        return small.model, small.model, small
    if isinstance(small, tuple) and len(small) == 2 and all(isinstance(model, nn.Module) for model in small):
        return small[0], small[1], None
    raise RecipeError(f"proxy takes a graft on a small model, or a tuned and an untuned model, not {small!r}")


class Proxy(nn.Module):
    """See :func:`proxy`. Called like the base, it gives the base's outputs with the sum for logits.

    The small models are held, but are no modules of this one: they stay where they are, on their own devices.
    """

    def __init__(
        self,
        base: nn.Module,
        tuned: nn.Module,
        untuned: nn.Module,
        graft: Graft | None = None,
        *,
        strength: float = 1.0,
    ) -> None:
        super().__init__()
        self.base, self.strength = base, strength
        self._small = (tuned, untuned, graft)
        sizes = [_outputs(model) for model in (base, tuned, untuned)]
        if len({size for size in sizes if size is not None}) > 1:
            raise RecipeError(
                f"the logits of the base are for {sizes[0]} tokens or classes, those of the small models for "
                f"{sizes[1]} and {sizes[2]}: proxy tuning adds them one by one, so all need one vocabulary"
            )

    def forward(self, *, labels: Tensor | None = None, **batch: Any) -> Any:
        """The base's outputs with the summed logits, and with ``loss`` given labels; without gradient."""
        with torch.no_grad():
            result = self.base(**batch)
            result.logits = self._summed(result.logits, self.change(**batch))
            if labels is not None:
                result.loss = self._loss(result.logits, labels)
        return result

    def _summed(self, logits: Tensor, change: Tensor) -> Tensor:
        if change.shape != logits.shape:
            raise RecipeError(
                f"the base gives logits of shape {tuple(logits.shape)}, the small models of {tuple(change.shape)}: "
                "proxy tuning needs models of one vocabulary"
            )
        return logits + self.strength * change.to(logits)

    @torch.no_grad()
    def change(self, **batch: Any) -> Tensor:
        """What tuning changed in the small model's logits, in float32."""
        tuned, untuned, graft = self._small
        after = tuned(**_on(tuned, batch)).logits.float()
        if graft is None:
            return after - untuned(**_on(untuned, batch)).logits.float().to(after.device)
        with graft.disabled():
            return after - untuned(**_on(untuned, batch)).logits.float()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if logits.ndim == 2:
            return F.cross_entropy(logits.float(), labels)
        base: Any = self.base
        loss: Tensor = base.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return loss

    def generate(self, *args: Any, logits_processor: Iterable[Any] = (), **settings: Any) -> Any:
        """The base's ``generate`` with the small models at work; what it rules out by itself stays ruled out."""
        pad = settings.get("pad_token_id", getattr(getattr(self.base, "config", None), "pad_token_id", None))
        processors = LogitsProcessorList([self.processor(pad_token_id=pad), *logits_processor])
        base: Any = self.base
        return base.generate(*args, logits_processor=processors, **settings)

    def processor(self, *, pad_token_id: int | None = None) -> ProxyScores:
        """The same as a processor of scores, for ``generate`` of the base; a fresh one for each call of it.

        Args:
            pad_token_id: such tokens at the start of a sequence are padding, which the small models do not see.
        """
        return ProxyScores(self, pad_token_id)


class ProxyScores(LogitsProcessor):
    """Adds what tuning changed in a small model to the base's scores, step by step.

    The normaliser of the scores stays, so that log-probabilities, which beam search hands in, remain such. The small
    models read the whole sequence at each step: beams may have changed places.
    """

    def __init__(self, proxy: Proxy, pad_token_id: int | None) -> None:
        self._proxy, self._pad = proxy, pad_token_id

    def __call__(self, input_ids: Int[Tensor, "batch n"], scores: Scores) -> Scores:
        mask = torch.ones_like(input_ids)
        if self._pad is not None:
            mask = (input_ids != self._pad).long().cummax(dim=1).values
        change = self._proxy.change(input_ids=input_ids, attention_mask=mask)[:, -1]
        summed = self._proxy._summed(scores, change)
        if torch.equal(summed, scores):
            return scores
        return summed + (scores.logsumexp(-1, keepdim=True) - summed.logsumexp(-1, keepdim=True))


def _on(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _outputs(model: Any) -> int | None:
    """How many tokens or classes a model's logits are for; None where it does not say."""
    config = getattr(model, "config", None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        return int(head.weight.shape[0])
    return getattr(config, "num_labels", None)
