"""Checkpoints: what comes back is what was saved, bit for bit, or the one before, or nothing; never code."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pickle
import resource
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from momentum_tuner.checkpoints import (
    CheckpointStore,
    Reference,
    SavedSlot,
    default_checkpoints,
    references_from_text,
    references_to_text,
)
from momentum_tuner.errors import CheckpointError

FOLDER = "digits-mlp"
OLD, NEW = f"{FOLDER}/worker-1.safetensors", f"{FOLDER}/worker-2.safetensors"
TYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(tmp_path / "checkpoints"))


@pytest.fixture(params=["folder", "file", "memory"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    urls = {
        "folder": str(tmp_path / "a b[1]*"),
        "file": f"file://{tmp_path}/checkpoints/",
        "memory": f"memory://{uuid.uuid4().hex}/check[points]",
    }
    return CheckpointStore(urls[request.param])


def slot(value: float, epoch: int = 3) -> SavedSlot:
    return SavedSlot({"parameters": torch.full((5,), value), "moment/velocity": torch.arange(5.0)}, {"epoch": epoch})


def same(one: SavedSlot, other: SavedSlot) -> bool:
    """Equal to the bit, so that NaN equals itself and 0.0 is not -0.0."""
    return (
        one.header == other.header
        and one.tensors.keys() == other.tensors.keys()
        and all(
            a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
            for a, b in ((one.tensors[name], other.tensors[name]) for name in one.tensors)
        )
    )


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def write(store: CheckpointStore, file: str, content: bytes) -> Reference:
    """A file of anybody's making, with the digest that a hostile database would give it."""
    path = Path(store.shown, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return Reference(file, hashlib.sha256(content).hexdigest())


def safetensors_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# What was saved comes back


def test_slots_come_back_from_any_store_with_tensors_of_any_type_to_the_bit(any_store):
    any_store.prepare()
    tensors = {f"buffer/{dtype}": torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype) for dtype in TYPES}
    tensors |= {"scalar": torch.tensor(7), "empty": torch.zeros(0, 3), "odd": torch.tensor([math.nan, -0.0, math.inf])}
    header = {"epoch": 4, "settings": {"learning_rate": 0.1}, "initial_loss": math.inf, "names": ["ä", None, True]}
    saved = {7: SavedSlot(tensors, header), 70: slot(1.0), 8: SavedSlot({}, {})}
    reference = any_store.save(NEW, saved)
    loaded = any_store.load({ticket: [reference] for ticket in saved})
    assert loaded.keys() == saved.keys()
    assert all(same(loaded[ticket], saved[ticket]) for ticket in saved)
    assert any_store.files(FOLDER) == [NEW]


def test_rows_of_one_tensor_and_tensors_in_the_same_memory_are_saved(store):
    rows = torch.randn(4, 10, requires_grad=True)
    tied = torch.randn(6)
    saved = {
        ticket: SavedSlot(
            {
                "row": rows[ticket],
                "column": rows[:, ticket],
                "tied": tied,
                "tied again": tied,
                "part": tied[2:4],
                "none of it": tied[3:3],
                "spread": tied[:1].expand(3),
                "turned": torch.arange(12.0).reshape(3, 4).T,
            },
            {},
        )
        for ticket in range(4)
    }
    reference = store.save(NEW, saved)
    loaded = store.load({ticket: [reference] for ticket in saved})
    assert all(same(loaded[ticket], saved[ticket]) for ticket in saved)


def test_thousands_of_tensors_and_no_slots_at_all(store):
    many = SavedSlot({f"buffer/{i}": torch.tensor([float(i)]) for i in range(5000)}, {})
    assert same(store.load({1: [store.save(NEW, {1: many})]})[1], many)
    assert store.load({1: [store.save(OLD, {})]}) == {}
    assert store.load({}) == {}


def test_what_was_loaded_outlives_its_file(store):
    reference = store.save(NEW, {1: slot(1.0)})
    loaded = store.load({1: [reference]})
    path = Path(store.shown, NEW)
    with path.open("r+b") as handle:
        handle.write(bytes(path.stat().st_size))
    store.remove(NEW)
    assert same(loaded[1], slot(1.0))


def test_each_ticket_gets_its_newest_and_each_file_is_read_once(any_store, monkeypatch):
    old = any_store.save(OLD, {1: slot(1.0), 2: slot(2.0), 3: slot(3.0)})
    new = any_store.save(NEW, {1: slot(10.0), 2: slot(20.0)})
    digest, digested = hashlib.file_digest, []
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: digested.append(args) or digest(*args))
    loaded = any_store.load({1: [new, old], 2: [old, new], 3: [new, old], 4: [new, old], 5: []})
    assert {ticket: s.tensors["parameters"][0].item() for ticket, s in loaded.items()} == {1: 10.0, 2: 2.0, 3: 3.0}
    assert len(digested) == 2


def test_a_file_can_be_read_by_those_who_can_read_its_folder(store):
    store.save(OLD, {1: slot(1.0)})
    for mode, expected in ((0o755, 0o644), (0o2775, 0o664), (0o700, 0o600)):
        Path(store.shown, FOLDER).chmod(mode)
        store.save(NEW, {1: slot(1.0)})
        assert stat.S_IMODE(Path(store.shown, NEW).stat().st_mode) == expected


# Removing


def test_files_and_folders_are_listed_and_removed(any_store):
    assert any_store.files(FOLDER) == []
    any_store.remove(NEW)
    any_store.remove_folder(FOLDER)
    other = any_store.save("other/worker-1.safetensors", {1: slot(5.0)})
    reference = any_store.save(OLD, {1: slot(1.0)})
    any_store.save(NEW, {1: slot(2.0)})
    assert any_store.files(FOLDER) == [OLD, NEW]
    any_store.remove(NEW)
    assert any_store.files(FOLDER) == [OLD]
    any_store.remove_folder(FOLDER)
    assert any_store.files(FOLDER) == []
    assert any_store.load({1: [reference]}) == {}
    assert same(any_store.load({1: [other]})[1], slot(5.0))


@pytest.mark.parametrize("name", ["", ".", "..", "../outside", "/etc", "*", "a/../..", "a//b", "a\\b", "a\0b", "a\n"])
def test_nothing_outside_the_root_is_listed_written_or_removed(tmp_path, store, name):
    outside = tmp_path / "outside" / "file"
    outside.parent.mkdir()
    outside.write_text("kept")
    kept = store.save(NEW, {1: slot(1.0)})
    assert store.files(name) == []
    store.remove(name)
    store.remove(f"{name}/file")
    store.remove_folder(name)
    with pytest.raises(CheckpointError, match="is not the name"):
        store.save(f"{name}/file", {1: slot(2.0)})
    assert outside.read_text() == "kept"
    assert same(store.load({1: [kept]})[1], slot(1.0))


def test_removing_a_folder_does_not_follow_links(tmp_path, store):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("kept")
    store.save(NEW, {1: slot(1.0)})
    Path(store.shown, FOLDER, "link").symlink_to(outside)
    Path(store.shown, "linked").symlink_to(outside)
    store.remove_folder(FOLDER)
    store.remove_folder("linked")
    assert (outside / "file").read_text() == "kept"
    assert not Path(store.shown, FOLDER).exists()


def test_what_cannot_be_removed_is_logged_and_not_raised(store, caplog):
    caplog.set_level(logging.INFO)
    Path(store.shown, NEW).mkdir(parents=True)
    store.remove(NEW)
    assert "is not removed" in caplog.text
    assert warnings_of(caplog) == []


# Whole or not at all

WRITER = """
import json, os, resource, signal, sys, torch
from momentum_tuner.checkpoints import CheckpointStore, SavedSlot
root, file = sys.argv[1:]
saved = {1: SavedSlot({"parameters": torch.full((100_000,), 2.0)}, {"epoch": 9})}
ends = {}
for end in ("checkpoint-writing", "checkpoint-written", "in safetensors"):
    if (child := os.fork()) == 0:
        if end == "in safetensors":  # the kernel ends a process whose file passes its limit
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        else:
            os.environ["MOMENTUM_TUNER_CRASH"] = f"{end}:{root}/{end}.crash"
            open(f"{root}/{end}.crash", "w").close()
        CheckpointStore(f"{root}/{end}").save(file, saved)
        os._exit(0)
    ends[end] = os.WTERMSIG(os.waitpid(child, 0)[1])
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CheckpointStore]:
    """Stores in each of which a process was ended by a signal as it saved `NEW`, with `OLD` in the store already."""
    root = tmp_path_factory.mktemp("ended")
    for end in ("checkpoint-writing", "checkpoint-written", "in safetensors"):
        CheckpointStore(str(root / end)).save(OLD, {1: slot(1.0)})
    ran = subprocess.run([sys.executable, "-c", WRITER, root, NEW], stdout=subprocess.PIPE, check=True, timeout=60)
    assert json.loads(ran.stdout) == {
        "checkpoint-writing": signal.SIGKILL,
        "checkpoint-written": signal.SIGKILL,
        "in safetensors": signal.SIGXFSZ,
    }
    return lambda end: CheckpointStore(str(root / end))


def reference_to(store: CheckpointStore, file: str) -> Reference:
    return Reference(file, hashlib.sha256(Path(store.shown, file).read_bytes()).hexdigest())


@pytest.mark.parametrize("end", ["checkpoint-writing", "in safetensors"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(ended, end):
    store = ended(end)
    assert not Path(store.shown, NEW).exists()
    assert same(store.load({1: [Reference(NEW, "0" * 64), reference_to(store, OLD)]})[1], slot(1.0))
    (leftover,) = set(store.files(FOLDER)) - {OLD}
    assert leftover.startswith(f"{FOLDER}/.worker-2.safetensors.")
    assert leftover.split("/")[1].endswith(".tmp")
    assert leftover.endswith("/worker-2.safetensors") == (end == "checkpoint-writing")
    store.remove(leftover)
    assert os.listdir(Path(store.shown, FOLDER)) == ["worker-1.safetensors"]


def test_a_kill_after_a_checkpoint_is_written_leaves_it_whole(ended):
    store = ended("checkpoint-written")
    assert store.files(FOLDER) == [OLD, NEW]
    loaded = store.load({1: [reference_to(store, NEW)]})[1]
    assert same(loaded, SavedSlot({"parameters": torch.full((100_000,), 2.0)}, {"epoch": 9}))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that is full: a write beyond the size fails (Python ignores the signal that comes with it)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_else(any_store):
    old = any_store.save(OLD, {1: slot(1.0)})
    with files_of_at_most(100_000), pytest.raises(CheckpointError) as error:
        any_store.save(NEW, {1: SavedSlot({"parameters": torch.zeros(100_000)}, {})})
    assert "cannot be saved" in str(error.value)
    assert "File too large" in str(error.value)
    assert "\n" not in str(error.value)
    assert any_store.files(FOLDER) == [OLD]
    assert same(any_store.load({1: [old]})[1], slot(1.0))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_disk_that_is_really_full_leaves_the_checkpoint_before(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine lets root not mount")
    try:
        store = CheckpointStore(str(disk))
        store.prepare()
        old = store.save(OLD, {1: slot(1.0)})
        with pytest.raises(CheckpointError, match="No space left on device"):
            store.save(NEW, {1: SavedSlot({"parameters": torch.zeros(100_000)}, {})})
        assert os.listdir(disk / FOLDER) == ["worker-1.safetensors"]
        assert same(store.load({1: [old]})[1], slot(1.0))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_upload_that_fails_half_way_is_removed(monkeypatch):
    store = CheckpointStore(f"memory://{uuid.uuid4().hex}")

    def put_half(self: MemoryFileSystem, local: str, remote: str) -> None:
        self.pipe_file(remote, Path(local).read_bytes()[:50])
        raise ConnectionResetError("reset by peer")

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "put_file", put_half)
        with pytest.raises(CheckpointError, match="reset by peer"):
            store.save(NEW, {1: slot(1.0)})
    assert store.files(FOLDER) == []


def test_a_type_that_safetensors_does_not_know_is_said_so(store):
    with pytest.raises(CheckpointError, match="complex128"):
        store.save(NEW, {1: SavedSlot({"parameters": torch.zeros(2, dtype=torch.complex128)}, {})})
    assert store.files(FOLDER) == []


def test_two_writers_of_one_name_leave_the_file_of_one_of_them(store):
    references: dict[float, list[Reference]] = {1.0: [], 2.0: []}

    def save_often(value: float) -> None:
        saved = {1: SavedSlot({"parameters": torch.full((50_000,), value)}, {"epoch": 3})}
        references[value] += [store.save(NEW, saved) for _ in range(15)]

    writers = [threading.Thread(target=save_often, args=(value,)) for value in references]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [len(set(made)) for made in references.values()] == [1, 1]
    found = [value for value, made in references.items() if store.load({1: made[:1]})]
    assert len(found) == 1
    assert store.files(FOLDER) == [NEW]


# Files that are broken, replaced or hostile


class Bomb:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return os.putenv, ("MOMENTUM_TUNER_BOMB", "it ran")


def damaged(good: bytes) -> Mapping[str, bytes]:
    middle = len(good) // 2
    return {
        "missing": b"",
        "empty": b"",
        "cut": good[:middle],
        "cut by one": good[:-1],
        "longer": good + b"\0",
        "a bit": good[:-3] + bytes([good[-3] ^ 1]) + good[-2:],
        "pickle": pickle.dumps(Bomb()),
    }


@pytest.mark.parametrize("damage", damaged(b"0123456789"))
def test_a_damaged_file_gives_way_to_the_one_before_then_to_nothing(store, caplog, damage):
    old, new = store.save(OLD, {1: slot(1.0), 2: slot(2.0)}), store.save(NEW, {1: slot(10.0), 2: slot(20.0)})
    path = Path(store.shown, NEW)
    path.write_bytes(damaged(path.read_bytes())[damage])
    if damage == "missing":
        path.unlink()
    loaded = store.load({1: [new, old], 2: [new, old], 3: [new]})
    assert same(loaded[1], slot(1.0))
    assert same(loaded[2], slot(2.0))
    (warning,) = [text for text in warnings_of(caplog) if NEW in text]
    assert ("no such file" if damage == "missing" else "digest") in warning
    Path(store.shown, OLD).write_bytes(b"")
    assert store.load({1: [new, old], 2: [new]}) == {}


def test_swapped_files_are_not_taken_for_each_other(store):
    old, new = store.save(OLD, {1: slot(1.0)}), store.save(NEW, {1: slot(10.0)})
    a, b = Path(store.shown, OLD), Path(store.shown, NEW)
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)
    assert store.load({1: [new, old]}) == {}
    assert store.load({1: [Reference(new.file, "f" * 64), Reference(new.file, old.digest)]}).keys() == {1}


HEADER = {"__metadata__": {"1": '{"epoch": 3}'}, "1/p": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
DEEP = "[" * 100_000


def with_slot_header(header: object) -> bytes:
    return safetensors_file(HEADER | {"__metadata__": {"1": header}}, bytes(8))


def with_tensor(**changed: object) -> bytes:
    return safetensors_file(HEADER | {"1/p": HEADER["1/p"] | changed}, bytes(8))


HOSTILE = {
    "empty": b"",
    "pickle": pickle.dumps(Bomb()),
    "a length beyond the file": struct.pack("<Q", 2**63) + b"{}",
    "the largest length": b"\xff" * 8 + b"{}",
    "no JSON": safetensors_file(b"\xff\xfe{"),
    "a deep header": safetensors_file(DEEP.encode()),
    "a header that is a list": safetensors_file([]),
    "cut": safetensors_file(HEADER, bytes(4)),
    "too long": safetensors_file(HEADER, bytes(80)),
    "numbers in the metadata": safetensors_file(HEADER | {"__metadata__": {"1": 3}}, bytes(8)),
    "metadata that is a list": safetensors_file(HEADER | {"__metadata__": []}, bytes(8)),
    "no metadata": safetensors_file({"1/p": HEADER["1/p"]}, bytes(8)),
    "another ticket": safetensors_file(HEADER | {"__metadata__": {"11": "{}"}}, bytes(8)),
    "a slot's header that is a list": with_slot_header("[]"),
    "a slot's header that is a number": with_slot_header("3"),
    "a slot's header that is no JSON": with_slot_header("{'epoch': 3}"),
    "a deep slot's header": with_slot_header('{"a":' + DEEP),
    "a long number": with_slot_header('{"epoch": ' + "9" * 5000 + "}"),
    "an unknown type": with_tensor(dtype="O"),
    "a type of numbers that torch has no name for": with_tensor(dtype="F4", shape=[16]),
    "a huge shape": with_tensor(shape=[2**62, 2**62]),
    "a shape that overflows to fit": with_tensor(shape=[2**62, 2, 0]),
    "a negative shape": with_tensor(shape=[-2]),
    "a shape of another size": with_tensor(shape=[3]),
    "offsets beyond the file": with_tensor(shape=[4], data_offsets=[0, 16]),
    "offsets the wrong way round": with_tensor(data_offsets=[8, 0]),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_with_the_right_digest_gives_way_to_the_one_before(store, caplog, content):
    """As where someone writes both to the store and to the database."""
    old = store.save(OLD, {1: slot(1.0)})
    new = write(store, NEW, content)
    assert same(store.load({1: [new, old]})[1], slot(1.0))
    assert store.load({1: [new]}) == {}
    first, second = warnings_of(caplog)  # one for each call
    assert first == second
    assert NEW in first
    assert "\n" not in first
    assert len(first) < 500
    assert "MOMENTUM_TUNER_BOMB" not in subprocess.run(["env"], capture_output=True, text=True).stdout


def test_the_files_of_these_tests_are_hostile_only_in_what_they_name(store):
    reference = write(store, NEW, safetensors_file(HEADER, bytes(8)))
    assert same(store.load({1: [reference]})[1], SavedSlot({"p": torch.zeros(2)}, {"epoch": 3}))


def test_a_pipe_in_place_of_a_file_is_not_waited_for(store):
    old = store.save(OLD, {1: slot(1.0)})
    os.mkfifo(Path(store.shown, NEW))
    assert same(store.load({1: [Reference(NEW, old.digest), old]})[1], slot(1.0))


def test_a_file_in_the_place_of_a_studys_folder_is_none_of_its_files(store):
    store.save(OLD, {1: slot(1.0)})
    store.remove_folder(FOLDER)
    Path(store.shown, FOLDER).write_text("in the way")
    assert store.files(FOLDER) == []


def test_a_store_that_fails_gives_way_with_one_warning(monkeypatch, caplog):
    store = CheckpointStore(f"memory://{uuid.uuid4().hex}")
    reference = store.save(NEW, {1: slot(1.0), 2: slot(2.0)})

    def fail(self: MemoryFileSystem, *_: object) -> None:
        raise RuntimeError("the server said no\nat length")

    monkeypatch.setattr(MemoryFileSystem, "get_file", fail)
    monkeypatch.setattr(MemoryFileSystem, "find", fail)
    assert store.load({1: [reference], 2: [reference]}) == {}
    assert warnings_of(caplog) == [f"checkpoint '{NEW}' is passed over: RuntimeError: the server said no"]
    assert store.files(FOLDER) == []


# References


def test_references_come_back_in_their_order():
    references = [Reference(NEW, "a" * 64), Reference(OLD, "0" * 64)]
    assert references_from_text(references_to_text(references)) == references
    assert references_from_text(references_to_text([])) == []


@pytest.mark.parametrize(
    "text", [None, "", "{", "null", "3", '"x"', "{}", "[3]", "[[]]", DEEP, "9" * 5000, '[{"file": 3, "digest": []}]']
)
def test_a_text_that_is_no_list_of_references_holds_none(text):
    assert references_from_text(text) == []


@pytest.mark.parametrize(
    "file",
    [
        "../x/y",
        "x/..",
        "./x",
        "x/../y",
        "/etc/passwd",
        "//x/y",
        "x",
        "x/",
        "x/y/z",
        "x\\y",
        "..\\x/y",
        "x/y\0",
        "x/y\n",
        "s3://x/y",
        "file:/x",
        "x:/y",
        "x/y::memory:",
        "x/*",
        "x/[a]",
        "x/%2e",
        "x/é",
        "~/x",
        "",
    ],
)
def test_a_hostile_reference_is_dropped_and_the_good_ones_stay(store, file):
    good = Reference(OLD, "0" * 64)
    assert references_from_text(references_to_text([Reference(file, "a" * 64), good])) == [good]
    assert store.load({1: [Reference(file, "a" * 64)]}) == {}


@pytest.mark.parametrize("digest", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n"])
def test_a_reference_without_a_digest_is_dropped(digest):
    assert references_from_text(references_to_text([Reference(OLD, digest)])) == []


# The place


def test_the_root_is_made_and_nothing_stays_in_it(any_store):
    any_store.prepare()
    any_store.prepare()
    assert any_store._system.find(any_store._root) == []


@contextmanager
def not_root() -> Iterator[None]:
    """Root may write to any folder."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_cannot_be_written_is_said_so_in_one_line():
    folder = Path(tempfile.mkdtemp())  # not below pytest's, which others than root cannot enter
    folder.chmod(0o555)
    try:
        for place in (folder, folder / "below"):
            store = CheckpointStore(str(place))
            with not_root(), pytest.raises(CheckpointError, match="cannot be written: Permission denied") as error:
                store.prepare()
            assert str(place) in str(error.value)
            assert error.value.exit_code == 2
            with not_root(), pytest.raises(CheckpointError, match="Permission denied"):
                store.save(NEW, {1: slot(1.0)})
            with not_root():
                store.remove_folder(FOLDER)
        assert list(folder.iterdir()) == []
    finally:
        folder.rmdir()


def test_a_file_in_place_of_the_folder_is_said_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Not a directory"):
        CheckpointStore(str(tmp_path / "file")).prepare()


def hides_its_cause(error: BaseException) -> bool:
    """Whether a traceback shows nothing of the library's own error, which may hold secrets."""
    return error.__cause__ is None and error.__suppress_context__


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftq://host/x", "Protocol not known: ftq; write a folder"),
        ("postgresql://zoe:hunter2@host/x", "Protocol not known: postgresql"),
        ("s3://bucket/x", r"pip install 'momentum-tuner\[s3\]'"),
        ("s3://zoe:hunter2@bucket/x?token=hunter3", r"pip install 'momentum-tuner\[s3\]'"),
        ("gs://bucket/x", "Please install gcsfs"),
    ],
)
def test_a_url_that_cannot_be_used_is_said_so_in_one_line_without_secrets(url, message):
    with pytest.raises(CheckpointError, match=message) as error:
        CheckpointStore(url)
    text = str(error.value)
    assert error.value.exit_code == 2
    assert "\n" not in text
    assert not any(secret in text for secret in ("zoe", "hunter2", "hunter3"))
    assert hides_its_cause(error.value)


def test_an_empty_url_does_not_mean_the_current_folder():
    with pytest.raises(CheckpointError, match="--checkpoints is empty; write a folder"):
        CheckpointStore(" ")


class Chatty(MemoryFileSystem):
    """A file system that tells its secrets whenever it fails."""

    protocol = "chatty"

    def pipe_file(self, path: str, *_: object, **__: object) -> None:
        raise RuntimeError(f"no entry to {path} nor chatty:/{path} for zoe with hunter/2, hunter%2F2\nat all")

    put_file = get_file = find = pipe_file


def test_secrets_of_a_url_are_never_shown_or_logged(caplog):
    caplog.set_level(logging.INFO)
    fsspec.register_implementation("chatty", Chatty, clobber=True)
    store = CheckpointStore("chatty://zoe:hunter%2F2@host/x")
    texts = [store.shown]
    for failing in (store.prepare, lambda: store.save(NEW, {1: slot(1.0)})):
        with pytest.raises(CheckpointError) as error:
            failing()
        texts.append(str(error.value))
        assert hides_its_cause(error.value)
    store.load({1: [Reference(NEW, "0" * 64)]})
    store.files(FOLDER)
    store.remove_folder(FOLDER)
    texts += [record.getMessage() for record in caplog.records if record.name.startswith("momentum_tuner")]
    assert len(texts) == 6
    assert not any(secret in text for secret in ("hunter", "zoe:") for text in texts)
    assert all("\n" not in text for text in texts)


def test_the_default_place_is_beside_an_sqlite_file_or_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_checkpoints("sqlite", "/data/momentum_tuner.db") == "/data/momentum_tuner.checkpoints"
    assert default_checkpoints("sqlite", "runs/my.study.db") == str(tmp_path / "runs" / "my.study.checkpoints")
    assert default_checkpoints("sqlite", "plain") == str(tmp_path / "plain.checkpoints")
    assert default_checkpoints("sqlite", None) == str(tmp_path / "momentum_tuner.checkpoints")
    assert default_checkpoints("postgresql", "studies") == str(tmp_path / "momentum_tuner.checkpoints")
