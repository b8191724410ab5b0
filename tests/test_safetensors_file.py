import json
import os
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from umbel.safetensors_file import FolderError, TensorFile, TensorWriter

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(4, dtype=torch.bfloat16),
    "c": torch.tensor([[1e-300]], dtype=torch.float64),
    "d": torch.tensor([0.5, -2.0], dtype=torch.float16),
    "e": torch.tensor(3.0),
}
GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(header, data=b"\0" * 8, length=None):
    """A file's bytes; `header` is JSON text or what is to become it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def opened(folder, content):
    (folder / "x.safetensors").write_bytes(content)
    return TensorFile(folder, "x.safetensors")


BROKEN = {
    "empty": (b"", "no safetensors file"),
    "half a length": (b"\1\0\0", "no safetensors file"),
    "length beyond the file": (raw({"a": GOOD}, length=10**6), "its header has"),
    "length of exabytes": (raw({"a": GOOD}, length=2**63), "its header has"),
    "truncated": (raw({"a": GOOD}, b"\0" * 7), "lies at"),
    "bytes left over": (raw({"a": GOOD}, b"\0" * 9), "the data at"),
    "not JSON": (raw(b"{]"), "not sound JSON"),
    "not UTF-8": (raw(b'{"\xff":1}'), "not sound JSON"),
    "a list": (raw(b"[1]"), "begin with an object"),
    "blank before it": (raw(b" {}", b""), "begin with an object"),
    "nested for ever": (raw(b'{"a":' + b"[" * 100_000), "not sound JSON"),
    "a name twice": (raw(b'{"a":' + json.dumps(GOOD).encode() + b',"a":' + json.dumps(GOOD).encode() + b"}"), "twice"),
    "not a number": (raw(b'{"a":NaN}'), "not sound JSON"),
    "entry of another form": (raw({"a": [1]}), "no dtype"),
    "entry with more": (raw({"a": {**GOOD, "more": 1}}), "no dtype"),
    "metadata of another form": (raw({"a": GOOD, "__metadata__": 1}), "__metadata__"),
    "unknown dtype": (raw({"a": {**GOOD, "dtype": "F8_E4M3"}}), "of dtype"),
    "dtype not text": (raw({"a": {**GOOD, "dtype": ["F32"]}}), "of dtype"),
    "shape not whole": (raw({"a": {**GOOD, "shape": [2.0]}}), "shape or data_offsets"),
    "shape of truth values": (raw({"a": {**GOOD, "shape": [True, 2]}}), "shape or data_offsets"),
    "negative shape": (raw({"a": {**GOOD, "shape": [-2]}}), "shape or data_offsets"),
    "huge shape": (raw({"a": {**GOOD, "shape": [2**62, 2**62]}}), "needs"),
    "shape that overflows to fit": (raw({"a": {**GOOD, "shape": [2**32, 2**32 + 2]}}), "needs"),
    "many axes": (raw({"a": {**GOOD, "shape": [1] * 9}}), "shape"),
    "empty tensor": (raw({"a": {**GOOD, "shape": [0], "data_offsets": [0, 0]}}, b""), "partial"),
    "shape against bytes": (raw({"a": {**GOOD, "shape": [3]}}), "needs 12"),
    "backwards": (raw({"a": {**GOOD, "data_offsets": [8, 0]}}), "lies at"),
    "three offsets": (raw({"a": {**GOOD, "data_offsets": [0, 4, 8]}}), "lies at"),
    "out of the file": (raw({"a": {**GOOD, "data_offsets": [4, 12]}}), "lies at"),
    "overlap": (raw({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, b"\0" * 12), "the tensor before it ends at 8"),
    "hole": (raw({"a": GOOD, "b": {**GOOD, "data_offsets": [12, 20]}}, b"\0" * 20), "the tensor before it ends at 8"),
}


def test_reads_what_the_library_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    file = TensorFile(tmp_path, "x.safetensors")
    assert set(file.entries) == set(TENSORS)
    assert file.bytes == (tmp_path / "x.safetensors").stat().st_size
    for name, got in zip(TENSORS, file.read(list(TENSORS)), strict=True):
        assert got.dtype == TENSORS[name].dtype
        assert torch.equal(got, TENSORS[name])


def test_nothing_of_the_file_stays_open_or_mapped(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path, "x.safetensors")
    before = sorted(os.listdir("/proc/self/fd"))
    kept = file.read(["a"])
    assert sorted(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert "x.safetensors" not in maps.read()
    assert torch.equal(kept[0], TENSORS["a"])


@pytest.mark.parametrize(("content", "words"), BROKEN.values(), ids=list(BROKEN))
def test_a_broken_file_is_refused_when_opened(tmp_path, content, words):
    with pytest.raises(FolderError, match=words) as caught:
        opened(tmp_path, content)
    message = str(caught.value)
    assert "x.safetensors" in message
    assert "\n" not in message
    assert len(message) < 600


@given(flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6), cut=st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_a_changed_header_is_refused_or_read_as_the_library_reads_it(tmp_path_factory, flips, cut):
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "x.safetensors"
    save_file({"a": torch.ones(2, 3), "bb": torch.ones(4)}, path)
    content = bytearray(path.read_bytes())
    for at, value in flips:
        content[at % len(content)] = value
    path.write_bytes(content[: len(content) - (cut if cut < 20 else 0)])
    try:
        file = TensorFile(folder, "x.safetensors")
    except FolderError:
        return
    wanted = load_file(path)
    assert {name: e.shape for name, e in file.entries.items()} == {name: tuple(x.shape) for name, x in wanted.items()}
    for name, x in zip(wanted, file.read(list(wanted)), strict=True):
        assert torch.equal(x.view(-1).view(torch.uint8), wanted[name].view(-1).view(torch.uint8))


@given(content=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_refused_in_words(tmp_path_factory, content):
    with pytest.raises(FolderError):
        opened(tmp_path_factory.mktemp("any"), struct.pack("<Q", max(0, len(content) - 8)) + b"{" + content + b"x")


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)
    with pytest.raises(FolderError, match="allowed: up to 100000000"):
        TensorFile(tmp_path, "x.safetensors")


@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_followed(tmp_path, absolute):
    folder, other = tmp_path / "folder", tmp_path / "folder-2"
    folder.mkdir()
    other.mkdir()
    for place in (folder, other):
        save_file(TENSORS, place / "real.safetensors")
    (folder / "out").symlink_to(other / "real.safetensors" if absolute else "../folder-2/real.safetensors")
    (folder / "in").symlink_to("real.safetensors")
    (folder / "nowhere").symlink_to("gone")
    assert torch.equal(TensorFile(folder, "in").read(["a"])[0], TENSORS["a"])
    with pytest.raises(FolderError, match="a link out of its folder"):
        TensorFile(folder, "out")
    with pytest.raises(FolderError, match="cannot be read"):
        TensorFile(folder, "nowhere")
    # The folder itself may be a link.
    (tmp_path / "link").symlink_to(folder)
    assert set(TensorFile(tmp_path / "link", "in").entries) == set(TENSORS)


def test_pipes_and_folders_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(FolderError, match="not a regular file"):
            TensorFile(tmp_path, name)


def test_a_file_that_changes_or_goes_between_opening_and_reading_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    file = TensorFile(tmp_path, "x.safetensors")
    with path.open("ab") as handle:
        handle.write(b"more")
    with pytest.raises(FolderError, match="was changed"):
        file.read(["a"])
    path.unlink()
    with pytest.raises(FolderError, match="cannot be read"):
        file.read(["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_library_reads_what_was_written_a_tensor_at_a_time(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    torch.manual_seed(0)
    tensors = {
        'odd "name" é': torch.randn(3, 5),
        "b": torch.randn(7).double(),
        "c": torch.randn(2, 2, 2)[:, 0],
        "d": torch.ones(()),
    }
    writer = TensorWriter(path, list(tensors), dtype)
    kept = {name: writer.add(name, x) for name, x in tensors.items()}
    assert writer.finish() == path.stat().st_size
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert file.metadata() == {"format": "pt"}
        for name, x in tensors.items():
            assert torch.equal(file.get_tensor(name), x.to(dtype))
            assert torch.equal(kept[name], x.to(dtype))


def test_room_is_kept_for_the_longest_header(tmp_path):
    names = [f"model.layers.{i}.self_attn.q_proj.lora_A.weight" for i in range(200)]
    writer = TensorWriter(tmp_path / "x", names, torch.float32)
    for name in names:
        writer.add(name, torch.ones(1, 1, 1, 1, 1, 1, 1, 1000))
    writer.finish()
    assert set(load_file(tmp_path / "x")) == set(names)


def test_values_that_leave_the_dtype_are_refused(tmp_path):
    writer = TensorWriter(tmp_path / "x", ["a"], torch.float16)
    with pytest.raises(FolderError, match=r"got up to 1e\+05.*65504|6\.55e\+04"):
        writer.add("a", torch.tensor([1e5]))
    writer.release()


def test_a_tensor_that_was_not_announced_is_a_mistake(tmp_path):
    writer = TensorWriter(tmp_path / "x", ["a"], torch.float32)
    writer.add("a", torch.ones(2))
    for name in ("a", "b"):
        with pytest.raises(ValueError, match="announced"):
            writer.add(name, torch.ones(2))
    writer.release()


def test_a_full_disk_is_the_system_s_error(tmp_path):
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = TensorWriter(tmp_path / "x", ["a"], torch.float32)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(OSError, match="too large"):
            writer.add("a", torch.ones(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        writer.release()
