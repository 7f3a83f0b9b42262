"""``README.md``: the model card of a graft, generated from its manifest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from finegraft.store.manifest import Manifest

PIPELINES = {  # task kind -> what the Hub calls it
    "classification": "text-classification",
    "regression": "text-classification",
    "causal-lm": "text-generation",
    "token-classification": "token-classification",
    "image-classification": "image-classification",
    "sentence-embedding": "sentence-similarity",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def card(manifest: Manifest, *, title: str | None = None, trained: int | None = None) -> str:
    """The text of a model card, with front matter that the Hub reads.

    Args:
        manifest: what the graft is.
        title: heading; by default the method and the base.
        trained: number of trained parameters, if it should be told.
    """
    method = " ".join(str(manifest.recipe.get("name") or "custom").split())
    base = manifest.fingerprint.name
    heading = title or f"{method} graft" + (f" for {base}" if base else "")
    sections = [
        f"---\n{_front_matter(manifest, method)}---",
        f"# {_inline(heading)}",
        "A graft made with finegraft: a small change to a pretrained model, for exactly that model.",
        _table(("", ""), _facts(manifest, method, trained)),
    ]
    if manifest.metrics:
        rows = [(name, _number(value)) for name, value in manifest.metrics.items()]
        sections.append("## Results\n\n" + _table(("metric", "value"), rows))
    sections.append(_LOADING)
    return "\n\n".join(sections) + "\n"


_LOADING = """## Use

```python
import finegraft as fg

graft = fg.load("path/to/this/folder", model)  # model: the base, as published
```

The graft carries a fingerprint of its base; loading it onto another model is an error, never silent."""


def _front_matter(manifest: Manifest, method: str) -> str:
    task = (manifest.task or {}).get("kind")
    fields: dict[str, Any] = {"library_name": "finegraft", "tags": sorted({"finegraft", method.lower()})}
    base = manifest.fingerprint.name
    # The Hub refuses cards whose base_model is not an id, and a local path can look like one
    if base and HUB_ID.fullmatch(base) and not Path(base).exists():
        fields["base_model"] = base
    if isinstance(task, str) and task in PIPELINES:
        fields["pipeline_tag"] = PIPELINES[task]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _facts(manifest: Manifest, method: str, trained: int | None) -> list[tuple[str, str]]:
    base = manifest.fingerprint
    rows = [
        ("method", method),
        ("base", f"{base.name or 'unnamed'} ({base.parameters:,} parameters)"),
        ("changed sites", f"{len(manifest.sites):,}"),
    ]
    if trained is not None:
        share = f" ({trained / base.parameters:.2%} of the base)" if base.parameters else ""
        rows.append(("trained parameters", f"{trained:,}{share}"))
    if manifest.task and manifest.task.get("kind"):
        rows.append(("task", str(manifest.task["kind"])))
    rows.append(("seed", str(manifest.seed)))
    plain = {name: value for name, value in manifest.provenance.items() if not isinstance(value, dict | list)}
    return rows + [(name, str(value)) for name, value in plain.items()]


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [header, ("---", "---"), *((_inline(name), _inline(value)) for name, value in rows)]
    return "\n".join(f"| {name} | {value} |" for name, value in lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _inline(text: str) -> str:
    """Text that cannot break out of its line or cell, nor be taken for HTML."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")
