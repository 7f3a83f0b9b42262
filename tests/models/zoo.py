"""Tiny models of every shape that finegraft must handle, built from configurations, each with a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.models.cifar_resnet import CifarResNet

Batch = dict[str, Any]
Built = tuple[nn.Module, Batch]

VOCABULARY, TOKENS = 64, 7
_BUILDERS: dict[str, Callable[[], Built]] = {}


def names() -> list[str]:
    """Names of all models, in order of definition."""
    return list(_BUILDERS)


def build(name: str, seed: int = 0) -> Built:
    """The model in evaluation mode and a batch such that ``model(**batch)`` works.

    Weights, also norms and biases, are random and far from any symmetric value, so that no test passes
    because a factor happened to be one or a bias zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, batch = _BUILDERS[name]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), batch


def output(result: Any) -> Tensor:
    """Logits, or the last hidden state, of what a model of the zoo returned."""
    if isinstance(result, Tensor):
        return result
    for field in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(result, field, None) is not None:
            return getattr(result, field)
    raise TypeError(f"no logits or hidden state in {type(result).__name__}")


def _model(builder: Callable[[], Built]) -> Callable[[], Built]:
    _BUILDERS[builder.__name__.strip("_").replace("_", "-")] = builder
    return builder


def _ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, tokens))


def _text() -> Batch:
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, -2:] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


def _image() -> Tensor:
    return torch.randn(2, 3, 16, 16)


_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@_model
def _mlp() -> Built:
    model = nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.LayerNorm(24), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5)
    )
    return model, {"input": torch.randn(3, 12)}


class TinyResNet(nn.Module):
    """What the CIFAR ResNet has not: grouped convolutions and a projected shortcut with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(ResidualBlock(8, 8), ResidualBlock(8, 8))
        self.layer2 = nn.Sequential(ResidualBlock(8, 16, stride=2))
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer2(self.layer1(x)).mean(dim=(2, 3)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, width: int, out: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        same = width == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(width, out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


@_model
def _resnet() -> Built:
    return TinyResNet(), {"x": _image()}


@_model
def _cifar_resnet() -> Built:
    return CifarResNet(depth=14), {"pixels": torch.randn(2, 3, 32, 32)}


@_model
def _bert() -> Built:
    return hf.BertForSequenceClassification(hf.BertConfig(**_ENCODER, num_labels=3)), _text()


@_model
def _bert_mlm() -> Built:
    """Output layer tied to the embedding, with a bias of its own that has two names."""
    return hf.BertForMaskedLM(hf.BertConfig(**_ENCODER)), _text()


@_model
def _roberta() -> Built:
    config = hf.RobertaConfig(**_ENCODER, **_SPECIAL, num_labels=3)
    return hf.RobertaForSequenceClassification(config), _text()


@_model
def _distilbert() -> Built:
    config = hf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=16
    )
    return hf.DistilBertForSequenceClassification(config), _text()


@_model
def _albert() -> Built:
    """One block shared by all depths."""
    config = hf.AlbertConfig(**_ENCODER, **_SPECIAL, embedding_size=16, num_labels=3)
    return hf.AlbertForSequenceClassification(config), _text()


_LLAMA = _ENCODER | _SPECIAL | {"num_key_value_heads": 2}


@_model
def _llama() -> Built:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, tie_word_embeddings=False)), _text()


@_model
def _llama_tied() -> Built:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, tie_word_embeddings=True)), _text()


@_model
def _gpt2() -> Built:
    """Projections stored transposed, query, key and value fused, embedding tied to the output."""
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=4, n_inner=48, **_SPECIAL
    )
    return hf.GPT2LMHeadModel(config), _text()


@_model
def _gpt_neox() -> Built:
    config = hf.GPTNeoXConfig(**_ENCODER, **_SPECIAL, tie_word_embeddings=False)
    return hf.GPTNeoXForCausalLM(config), _text()


@_model
def _phi3() -> Built:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**_LLAMA, tie_word_embeddings=False)), _text()


@_model
def _mixtral() -> Built:
    """Experts fused into three-dimensional parameters, the router a bare matrix."""
    config = hf.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
    return hf.MixtralForCausalLM(config), _text()


@_model
def _qwen2_moe() -> Built:
    """Fused experts next to a shared expert with its own gate."""
    config = hf.Qwen2MoeConfig(
        **_LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=40, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Qwen2MoeForCausalLM(config), _text()


def _t5(**changes: Any) -> Built:
    """One table for both stacks and the output."""
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        relative_attention_num_buckets=8, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **changes,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config), _text() | {"decoder_input_ids": _ids(5)}


@_model
def _t5_ungated() -> Built:
    return _t5(feed_forward_proj="relu")


@_model
def _t5_gated() -> Built:
    return _t5(feed_forward_proj="gated-gelu")


_VISION = {"image_size": 16, "patch_size": 8}
_TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@_model
def _vit() -> Built:
    config = hf.ViTConfig(**_TOWER, **_VISION, num_labels=3)
    return hf.ViTForImageClassification(config), {"pixel_values": _image()}


@_model
def _clip() -> Built:
    text = _TOWER | _SPECIAL | {"vocab_size": VOCABULARY, "max_position_embeddings": 16}
    config = hf.CLIPConfig(text_config=text, vision_config=_TOWER | _VISION, projection_dim=24)
    return hf.CLIPModel(config), _text() | {"pixel_values": _image()}


@_model
def _whisper() -> Built:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=10, max_target_positions=16, decoder_start_token_id=1, **_SPECIAL,
    )  # fmt: skip
    model = hf.WhisperForConditionalGeneration(config)
    return model, {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": _ids(5)}


@_model
def _ast() -> Built:
    config = hf.ASTConfig(
        **_TOWER, patch_size=4, num_mel_bins=8, max_length=12, frequency_stride=4, time_stride=4, num_labels=3
    )
    return hf.ASTForAudioClassification(config), {"input_values": torch.randn(2, 12, 8)}


@_model
def _torch_encoder() -> Built:
    """torch's own encoder: query, key and value as one bare tensor, the output projection never called."""
    layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=48, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"src": torch.randn(2, TOKENS, 32)}
