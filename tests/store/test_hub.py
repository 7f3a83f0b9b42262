"""The Hub, played by a folder."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from finegraft import store
from finegraft.errors import StoreError
from tests.store.examples import SMALL, manifest, same


class FolderHub:
    """Keeps repositories below a folder, and hands them out as the client's cache does: as links to blobs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.private: dict[str, bool] = {}

    def create_repo(self, repo_id, *, token, private, exist_ok):
        repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        assert exist_ok or repo_id not in self.private
        self.private.setdefault(repo_id, private)
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message, token):
        for name in allow_patterns:
            if (folder_path / name).exists():
                shutil.copy(folder_path / name, self.root / repo_id / name)
        return f"https://hub.example/{repo_id}/commit/1"

    def snapshot_download(self, repo_id, *, revision, local_dir, allow_patterns, token):
        if repo_id not in self.private:
            raise FileNotFoundError(f"404: {repo_id} at {revision or 'main'}")
        if local_dir is not None:
            local_dir.mkdir(parents=True, exist_ok=True)
        cache = self.root / "cache" / repo_id.replace("/", "--")
        snapshot, blobs = local_dir or cache / "snapshots" / "abc", cache / "blobs"
        for folder in (snapshot, blobs):
            folder.mkdir(parents=True, exist_ok=True)
        for file in (self.root / repo_id).iterdir():
            if file.name not in allow_patterns:
                continue
            if local_dir is None:
                shutil.copy(file, blobs / f"hash-of-{file.name}")
                (snapshot / file.name).symlink_to(Path("../../blobs") / f"hash-of-{file.name}")
            else:
                shutil.copy(file, local_dir / file.name)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path):
    return FolderHub(tmp_path / "hub")


@pytest.fixture
def graft(tmp_path):
    store.write(tmp_path / "graft", SMALL, manifest(), card="card")
    (tmp_path / "graft" / "secrets.env").write_text("mine")
    return tmp_path / "graft"


@pytest.mark.parametrize("local", [True, False])
def test_a_graft_survives_the_hub(graft, hub, tmp_path, local):
    address = store.push(graft, "owner/sst2", private=True, api=hub)
    assert address == "https://hub.example/owner/sst2/commit/1"
    assert hub.private == {"owner/sst2": True}
    assert sorted(os.listdir(hub.root / "owner/sst2")) == sorted(store.FILES)
    path = store.pull("owner/sst2", local_dir=tmp_path / "here" if local else None, api=hub)
    tensors, found = store.read(path)
    assert same(tensors, SMALL)
    assert found == store.read_manifest(graft)


def test_an_owner_is_filled_in_by_the_hub(graft, hub):
    assert "me/sst2" in store.push(graft, "sst2", api=hub)
    assert store.push(graft, "sst2", api=hub)


def test_only_a_graft_is_taken_out_of_a_repository(graft, hub):
    store.push(graft, "owner/sst2", api=hub)
    (hub.root / "owner/sst2" / "payload.py").write_text("boom")
    assert sorted(os.listdir(store.pull("owner/sst2", api=hub))) == sorted(store.FILES)


def test_the_last_save_is_pushed_even_if_it_was_cut_off(graft, hub, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
        with pytest.warns(RuntimeWarning, match="the graft is saved"):
            store.write(graft, {}, manifest(seed=5), card="new")
    store.push(graft, "owner/sst2", api=hub)
    assert store.read(store.pull("owner/sst2", api=hub))[1].seed == 5


def test_a_damaged_graft_is_not_pushed(graft, hub):
    with open(graft / "graft.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(StoreError, match="changed after it was written"):
        store.push(graft, "owner/sst2", api=hub)
    assert hub.private == {}


def test_a_repository_without_a_graft_is_named(hub):
    hub.create_repo("owner/else", token=None, private=False, exist_ok=False)
    with pytest.raises(StoreError, match="owner/else holds no usable graft"):
        store.pull("owner/else", api=hub)


def test_links_from_a_snapshot_to_elsewhere_are_refused(graft, hub, tmp_path):
    store.push(graft, "owner/sst2", api=hub)
    path = store.pull("owner/sst2", api=hub)
    (path / "graft.json").unlink()
    (path / "graft.json").symlink_to(graft / "graft.json")
    with pytest.raises(StoreError, match="outside its folder"):
        store.read(path)


@pytest.mark.parametrize("repo_id", ["../graft", "a/b/c", "", "https://hub.example/a", "a b"])
def test_a_malformed_repository_is_refused_before_anything_is_asked(graft, repo_id):
    for ask in (lambda: store.push(graft, repo_id, api=None), lambda: store.pull(repo_id, api=None)):
        with pytest.raises(StoreError, match="should look like 'owner/name'"):
            ask()


def test_a_hub_that_is_not_reached_is_an_error_that_names_the_repository(graft, tmp_path):
    nowhere = HfApi(endpoint="http://127.0.0.1:9", token=False)
    with pytest.raises(StoreError, match="could not find or make the Hub repository owner/sst2"):
        store.push(graft, "owner/sst2", api=nowhere)
    with pytest.raises(StoreError, match="could not download from the Hub repository owner/sst2"):
        store.pull("owner/sst2", local_dir=tmp_path / "here", api=nowhere)


def test_a_repository_that_is_missing_is_an_error_that_names_it(hub):
    with pytest.raises(StoreError, match="owner/absent: FileNotFoundError: 404: owner/absent at v2"):
        store.pull("owner/absent", revision="v2", api=hub)
