"""A save that fails at any step leaves what was there; one that is cut off leaves one graft, whole."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from finegraft import store
from finegraft.errors import StoreError
from finegraft.store import folder, tensors_file
from tests.store.examples import SMALL, manifest, same

OLD = SMALL
NEW = {"layer.0.a": torch.arange(300.0), "layer.1.rows": torch.arange(7)}
STEPS = [
    *((os, name) for name in ("mkdir", "rename", "replace", "fsync", "rmdir", "open")),
    *((Path, name) for name in ("write_bytes", "write_text")),
    (tensors_file, "save_file"),
    (shutil, "rmtree"),
]
MOST_STEPS = 60  # more than a save takes


class PowerCut(BaseException):
    """The process is gone: nothing it does from now on reaches the disk."""


class Faults:
    """Counts the steps of a save that touch the disk, and lets some of them fail."""

    def __init__(self, monkeypatch, fails, error) -> None:
        self.taken: list[str] = []
        self.fails, self.error = fails, error
        for owner, name in STEPS:
            monkeypatch.setattr(owner, name, self._watched(name, getattr(owner, name)))

    def _watched(self, name, original):
        def step(*args, **kwargs):
            self.taken.append(name)
            if self.fails(len(self.taken) - 1):
                raise self.error
            return original(*args, **kwargs)

        return step


def save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    store.write(path, tensors, manifest(seed=len(tensors)), card=f"{len(tensors)} tensors")


def content(path: Path) -> dict[str, torch.Tensor]:
    tensors, found = store.read(path)
    assert found.seed == len(tensors)  # never the manifest of one and the tensors of the other
    return tensors


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def is_litter(path: Path) -> bool:
    return path.name.startswith(".graft")


@pytest.fixture
def target(tmp_path):
    save(tmp_path / "graft", OLD)
    (tmp_path / "graft" / "notes.txt").write_text("mine")
    return tmp_path / "graft"


def no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", range(MOST_STEPS))
@pytest.mark.filterwarnings("ignore:the graft is saved")
def test_a_save_over_a_graft_succeeds_or_changes_nothing(target, step):
    before = files(target)
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, lambda n: n == step, no_space())
        error = None
        try:
            save(target, NEW)
        except StoreError as raised:
            error = raised
    assert step < len(faults.taken) or error is None
    if error is not None:
        assert "No space left on device" in str(error)
        assert files(target) == before
        assert not any(is_litter(p) for p in target.parent.rglob("*"))
    else:
        assert same(content(target), NEW)
        assert (target / "notes.txt").read_text() == "mine"
    save(target, NEW)
    assert sorted(p.name for p in target.iterdir()) == sorted([*store.FILES, "notes.txt"])


@pytest.mark.parametrize("step", range(MOST_STEPS))
@pytest.mark.filterwarnings("ignore:the graft is saved")
def test_a_power_cut_at_any_step_leaves_the_old_or_the_new_graft(target, step):
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(PowerCut):
        Faults(patch, lambda n: n >= step, PowerCut())
        save(target, NEW)
    found = content(target)
    assert same(found, OLD) or same(found, NEW)
    assert store.size(target) > 0
    save(target, OLD)
    assert same(content(target), OLD)
    assert (target / "notes.txt").read_text() == "mine"
    assert not (target / folder.PENDING).exists()


@pytest.mark.parametrize("step", range(MOST_STEPS))
def test_a_first_save_appears_whole_or_not_at_all(tmp_path, step):
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, lambda n: n == step, no_space())
        with contextlib.suppress(StoreError):
            save(tmp_path / "graft", NEW)
    if (tmp_path / "graft").exists():
        assert same(content(tmp_path / "graft"), NEW)
    assert [p.name for p in tmp_path.iterdir() if p.name != "graft"] == []


def test_the_injected_faults_cover_every_step_of_a_save(target, monkeypatch):
    faults = Faults(monkeypatch, lambda n: False, no_space())
    save(target, NEW)
    assert len(faults.taken) < MOST_STEPS
    assert {"mkdir", "rename", "replace", "fsync", "rmdir", "save_file", "write_bytes"} <= set(faults.taken)


def test_files_reach_the_disk_before_the_rename_that_commits_them(target, monkeypatch):
    faults = Faults(monkeypatch, lambda n: False, no_space())
    save(target, NEW)
    commit = faults.taken.index("rename")
    assert faults.taken[:commit].count("fsync") == len(store.FILES) + 1
    assert faults.taken[commit + 1 :].count("fsync") == 2  # the commit itself, then the moves


def test_a_committed_save_is_read_while_its_files_are_being_moved(target, monkeypatch):
    seen = []
    replace = os.replace

    def look_then_replace(source, destination):
        seen.append(content(target))
        replace(source, destination)
        seen.append(content(target))

    monkeypatch.setattr(os, "replace", look_then_replace)
    save(target, NEW)
    assert len(seen) == 2 * len(store.FILES)
    assert all(same(found, NEW) for found in seen)


def test_a_save_that_cannot_tidy_up_says_so_and_is_still_read(target, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
    with pytest.warns(RuntimeWarning, match="the graft is saved"):
        save(target, NEW)
    assert same(content(target), NEW)


def test_a_reader_overtaken_by_a_save_reads_what_was_saved(target, monkeypatch):
    original = tensors_file.safe_open
    saves = iter([NEW])

    def overtaken(*args, **kwargs):
        for tensors in saves:
            save(target, tensors)
        return original(*args, **kwargs)

    monkeypatch.setattr(tensors_file, "safe_open", overtaken)
    assert same(content(target), NEW)


def test_a_real_full_disk_keeps_the_old_graft(target, monkeypatch):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StoreError, match=r"not saved.*untouched"):
            save(target, {"large": torch.zeros(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert same(content(target), OLD)
    assert not any(is_litter(p) for p in target.parent.rglob("*"))


def test_killed_in_the_middle_of_endless_saves(tmp_path):
    script = textwrap.dedent(
        """
        import sys, torch
        from pathlib import Path
        from tests.store.test_atomicity import NEW, OLD, save
        while True:
            for tensors in (OLD, NEW):
                save(Path(sys.argv[1]), tensors)
                print("saved", flush=True)
        """
    )
    target = tmp_path / "graft"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(target)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        for _ in range(25):
            process.stdout.readline()
        for _ in range(200):  # read against the writer, as fast as it goes
            found = content(target)
            assert same(found, OLD) or same(found, NEW)
        process.kill()
    found = content(target)
    assert same(found, OLD) or same(found, NEW)


def test_the_remains_of_a_killed_save_are_removed_a_day_later(target):
    for name, age in (("recent", 3600), ("old", 25 * 3600)):
        remains = target / f"{folder.STAGING}{name}"
        remains.mkdir()
        (remains / "graft.json").write_text("{}")
        os.utime(remains, (time.time() - age,) * 2)
    save(target, NEW)
    assert [p.name for p in target.iterdir() if is_litter(p)] == [f"{folder.STAGING}recent"]


def test_two_that_save_at_once_leave_one_graft_whole(target):
    def keep_saving(tensors):
        saved = 0
        for _ in range(40):
            with contextlib.suppress(StoreError):  # the other one was just committing
                save(target, tensors)
                saved += 1
        return saved

    with ThreadPoolExecutor() as pool:
        saves = [pool.submit(keep_saving, tensors) for tensors in (OLD, NEW)]
        while not all(job.done() for job in saves):
            found = content(target)
            assert same(found, OLD) or same(found, NEW)
    assert sum(job.result() for job in saves) >= 40
    assert sorted(p.name for p in target.iterdir()) == sorted([*store.FILES, "notes.txt"])


def test_a_save_that_another_overtakes_says_so(target, monkeypatch):
    settle = folder.settle
    monkeypatch.setattr(folder, "settle", lambda place: (settle(place), (place / folder.PENDING).mkdir()))
    monkeypatch.setattr(folder, "sync", lambda path: None)
    rival = target / folder.PENDING / "graft.json"
    monkeypatch.setattr(os, "rename", _after(lambda: rival.write_text("{}"), os.rename))
    with pytest.raises(StoreError, match=r"not saved to .*: another save to it is running\. Save again"):
        save(target, NEW)


def _after(first, then):
    return lambda *arguments: (first(), then(*arguments))


def test_an_empty_folder_and_missing_parents_are_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "not" / "yet" / "there"):
        save(path, NEW)
        assert sorted(p.name for p in path.iterdir()) == sorted(store.FILES)


def test_a_folder_behind_a_link_is_written_where_it_is(tmp_path, target):
    (tmp_path / "link").symlink_to(target)
    save(tmp_path / "link", NEW)
    assert (tmp_path / "link").is_symlink()
    assert same(content(target), NEW)


def test_other_peoples_folders_and_files_are_refused_and_untouched(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "README.md").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, reason in (("photos", "holds no graft.*README.md"), ("file", "is a file")):
        with pytest.raises(StoreError, match=reason):
            save(tmp_path / name, NEW)
    assert set(files(tmp_path).values()) == {b"mine"}
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("path", ["nul\0byte", "long" * 2000])
def test_a_path_that_cannot_be_is_refused(path):
    with pytest.raises(StoreError, match="not saved"):
        save(path, NEW)


def test_a_folder_in_the_place_of_a_file_is_refused(target):
    (target / "README.md").unlink()
    (target / "README.md").mkdir()
    with pytest.raises(StoreError, match=r"README\.md is a folder"):
        save(target, NEW)
    assert same(content(target), OLD)


def test_an_unwarned_save_leaves_exactly_its_files(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path / "graft", OLD)
        save(tmp_path / "graft", NEW)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted(store.FILES)
