import yaml

from finegraft import store
from tests.store.examples import base_fingerprint, manifest


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_front_matter_is_what_the_hub_reads():
    assert front_matter(store.card(manifest())) == {
        "library_name": "finegraft",
        "tags": ["finegraft", "lora"],
        "base_model": "owner/base",
        "pipeline_tag": "text-classification",
    }


def test_a_base_that_is_a_local_path_is_not_claimed_to_be_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "owner" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front_matter(store.card(manifest()))
    local = base_fingerprint().model_copy(update={"name": "/models/base"})
    assert "base_model" not in front_matter(store.card(manifest(fingerprint=local)))


def test_the_card_tells_results_and_how_to_load():
    text = store.card(manifest(), trained=3, title="My graft")
    assert "# My graft\n" in text
    assert "| accuracy | 0.875 |" in text
    assert "| trained parameters | 3 (50.00% of the base) |" in text
    assert "fg.load(" in text


def test_a_graft_without_task_metrics_or_names_has_a_card():
    unnamed = base_fingerprint().model_copy(update={"name": None})
    text = store.card(manifest(recipe={}, task=None, metrics={}, fingerprint=unnamed))
    assert front_matter(text) == {"library_name": "finegraft", "tags": ["custom", "finegraft"]}
    assert "Results" not in text


def test_values_cannot_break_out_of_their_place():
    hostile = "x\n---\nlicense: mine\n| <script>"
    text = store.card(manifest(recipe={"name": hostile}, metrics={hostile: 1.0}))
    assert front_matter(text)["tags"] == sorted(["finegraft", " ".join(hostile.split())])
    body = text.split("---\n\n", 1)[1]
    assert "license: mine" not in [line.strip() for line in body.splitlines()]
    assert "<script>" not in body
