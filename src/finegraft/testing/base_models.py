"""Tiny networks, each with one site of a type that changes can be put on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

VOCABULARY = 11


class Sandwich(nn.Module):
    """``after(tanh(site(before(x))))``: gradients cross the site on their way down, and what it gives is bent."""

    def __init__(self, before: nn.Module, site: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.site, self.after = before, site, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.site(self.before(x))))


class CalledTwice(nn.Module):
    """One layer that runs twice in every forward pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.site, self.after = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.site(torch.tanh(self.site(x)))))


class RootMeanSquareRMSNorm(nn.Module):
    """Normalisation as Llama writes it: a gain without a bias, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class BareMatrix(nn.Module):
    """A matrix that is no layer's, read in forward."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.randn(out, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.projection.transpose(0, 1)


class BareVector(nn.Module):
    """A vector that is no layer's: a gain on a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * torch.tanh(x)


class ExpertStack(nn.Module):
    """Matrices of several experts in one tensor, each weighed by the input."""

    def __init__(self, experts: int, width: int, out: int) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(experts, out, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(x[..., : self.stack.shape[0]], dim=-1)
        return torch.einsum("...e,eow,...w->...o", weights, self.stack, x)


class TiedTable(nn.Module):
    """A table of embeddings that is the matrix of the output layer as well."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(VOCABULARY, width), nn.Linear(width, width)
        self.out = nn.Linear(width, VOCABULARY, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.embed(ids))))


class TiedPair(nn.Module):
    """Two layers with one matrix between them, each with a bias of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class FeedForward(nn.Module):
    """``down(act(up(x)))``, named as language models do."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class Attention(nn.Module):
    """Attention that fetches its function where Transformers' models do; two query heads share one key head."""

    is_causal = True

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim, self.num_key_value_groups = width // heads, 2
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj, self.v_proj = nn.Linear(width, width // 2), nn.Linear(width, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)
        query, key, value = (f(x).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        y, _ = attend(self, query, key, value, None, dropout=0.0, scaling=self.head_dim**-0.5)
        return self.o_proj(y.reshape(x.shape))


class Block(nn.Module):
    """A transformer block without norms."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(width, heads), FeedForward(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class NormedBlock(Block):
    """The same with norms before the sublayers."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__(width, inner, heads)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Classifier(nn.Module):
    """A transformer that reads token ids and, given labels, returns a loss: a site of every common role."""

    def __init__(self, width: int, inner: int, heads: int, *, depth: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(NormedBlock(width, inner, heads) for _ in range(depth))
        self.norm, self.classifier = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.classifier(self.norm(x).mean(dim=1))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class ConvNet(nn.Module):
    """A small image classifier, for methods that go on convolutions."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.classifier = nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, classes)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(pixels)))))
        logits = self.classifier(x.mean(dim=(2, 3)))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Transformer(nn.Module):
    """A stack of blocks, one by default, which have sublayers and attention calls."""

    def __init__(self, width: int, inner: int, heads: int, *, depth: int = 1) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(width, width), nn.Linear(width, width)
        self.layers = nn.ModuleList(Block(width, inner, heads) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for layer in self.layers:
            x = layer(x)
        return self.after(x)
