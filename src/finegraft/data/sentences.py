"""A text encoder that gives one vector for a text, and its losses."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

_SHARPNESS = 20.0  # cosines lie in [-1, 1]; softmax over them needs a wider range


class SentenceEncoder(nn.Module):
    """Mean of an encoder's last hidden states over the tokens of a text, scaled to unit length.

    Trained on pairs: with a score (floating-point ``labels``) by the squared difference of cosine and score;
    without (integer ``labels``: the row of each text's partner) by cross entropy over the cosines to all
    partners in the batch, times 20, so that all other pairs serve as negatives (Henderson et al. 2017,
    "Efficient Natural Language Response Suggestion for Smart Reply", arXiv:1705.00652; the mean pooling is of
    Reimers and Gurevych 2019, "Sentence-BERT", arXiv:1908.10084).

    Args:
        encoder: a Transformers model whose output has ``last_hidden_state``.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.config = encoder.config

    def gradient_checkpointing_enable(self, **arguments: Any) -> None:
        """Recompute the encoder's activations in the backward pass."""
        self.encoder.gradient_checkpointing_enable(**arguments)

    def embed(
        self, input_ids: Int[Tensor, "text time"], attention_mask: Int[Tensor, "text time"], **inputs: Tensor
    ) -> Float[Tensor, "text width"]:
        """Vectors of unit length, one for each text."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        return nn.functional.normalize(mean, dim=-1)

    def forward(
        self,
        input_ids: Int[Tensor, "row *side time"],
        attention_mask: Int[Tensor, "row *side time"],
        token_type_ids: Int[Tensor, "row *side time"] | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Embed single texts, or compare the two texts of each row.

        Args:
            input_ids: (row, time) for single texts, (row, 2, time) for pairs.
            attention_mask: 1 for tokens, 0 for padding; same shape.
            token_type_ids: same shape; left out for encoders without them.
            labels: pairs only: scores in [-1, 1] (row,), or the partner's row number (row,).

        Returns:
            ``logits``: (row, width) vectors for single texts; (row,) cosines for pairs with scores or without
            labels; (row, row) cosines times 20 for pairs with partners. ``loss`` when there are ``labels``.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        flat = {name: value.flatten(0, -2) for name, value in inputs.items() if value is not None}
        vectors = self.embed(**flat)
        if input_ids.dim() == 2:
            return {"logits": vectors}
        left, right = vectors.unflatten(0, (-1, 2)).unbind(1)
        if labels is None:
            return {"logits": (left * right).sum(-1)}
        if labels.is_floating_point():
            cosine = (left * right).sum(-1)
            return {"loss": nn.functional.mse_loss(cosine.float(), labels.float()), "logits": cosine}
        similarity = _SHARPNESS * left @ right.T
        return {"loss": nn.functional.cross_entropy(similarity.float(), labels), "logits": similarity}
