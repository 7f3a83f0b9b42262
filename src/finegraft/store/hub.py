"""Grafts to and from the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from finegraft.errors import StoreError
from finegraft.store import folder
from finegraft.store.reading import read, read_manifest

T = TypeVar("T")


@runtime_checkable
class HubApi(Protocol):
    """The part of `huggingface_hub.HfApi` that grafts need; a stand-in may be given for it."""

    def create_repo(self, repo_id: str, *, token: str | None, private: bool, exist_ok: bool) -> Any:
        """Make a repository; returns an object whose ``repo_id`` has the owner filled in."""

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        allow_patterns: list[str],
        commit_message: str,
        token: str | None,
    ) -> Any:
        """Upload files as one commit; returns an object whose text is its address."""

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None,
        local_dir: Path | None,
        allow_patterns: list[str],
        token: str | None,
    ) -> str:
        """Download files; returns the folder they are in."""


def push(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload graft",
    api: HubApi | None = None,
) -> str:
    """Upload the graft in the folder ``path``, checked whole beforehand, as one commit.

    Args:
        path: the graft; other files in the folder stay here.
        repo_id: ``owner/name``; made if it does not exist.
        private: whether a repository made here is private.
        token: access token; by default the one of ``hf auth login``.
        message: commit message.
        api: stand-in for `huggingface_hub.HfApi`.

    Returns:
        The address of the commit.

    Raises:
        StoreError: no whole graft there, a malformed ``repo_id``, or a Hub that refuses or is not reached.
    """
    _require_repo_id(repo_id)
    hub = api or HfApi()
    source = folder.as_path(path).resolve()
    read(source)
    try:
        folder.settle(source)
    except OSError as error:
        raise StoreError(f"the last save to {source} cannot be finished, so it is not pushed: {error}") from error
    repo = _asked(
        "find or make",
        repo_id,
        lambda: hub.create_repo(repo_id, token=token, private=private, exist_ok=True),
    )
    commit = _asked(
        "upload to",
        repo_id,
        lambda: hub.upload_folder(
            repo_id=repo.repo_id,
            folder_path=source,
            allow_patterns=list(folder.FILES),
            commit_message=message,
            token=token,
        ),
    )
    return str(commit)


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    local_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
    api: HubApi | None = None,
) -> Path:
    """Download a graft, and nothing else that its repository may hold.

    Args:
        repo_id: ``owner/name``.
        revision: branch, tag or commit; by default the main branch.
        local_dir: where to put it; by default the Hub client's cache.
        token: access token; by default the one of ``hf auth login``.
        api: stand-in for `huggingface_hub.HfApi`.

    Returns:
        The folder, to be given to `finegraft.store.read`.

    Raises:
        StoreError: a malformed ``repo_id``, no graft in it, or a Hub that refuses or is not reached.
    """
    _require_repo_id(repo_id)
    hub = api or HfApi()
    found = _asked(
        "download from",
        repo_id,
        lambda: hub.snapshot_download(
            repo_id,
            revision=revision,
            local_dir=None if local_dir is None else Path(local_dir),
            allow_patterns=list(folder.FILES),
            token=token,
        ),
    )
    try:
        read_manifest(found)
    except StoreError as error:
        raise StoreError(f"the Hub repository {repo_id} holds no usable graft: {error}") from error
    return Path(found)


def _require_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = f"it should look like 'owner/name': {error}"
        raise StoreError(f"{repo_id!r} is not a Hub repository; {reason}") from error


def _asked(action: str, repo_id: str, request: Callable[[], T]) -> T:
    try:
        return request()
    except Exception as error:  # the client lets through whatever its HTTP library raises
        reason = f"{type(error).__name__}: {error}"
        raise StoreError(f"could not {action} the Hub repository {repo_id}: {reason}") from error
