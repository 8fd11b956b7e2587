"""Adapters out and in as zip files: what goes out PEFT loads, what comes in is refused unless it fits to the last tensor."""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from claas.adapters.archive import import_zip
from claas.adapters.export import export_zip
from claas.adapters.store import CONFIG, MANIFEST, OPTIMIZER, WEIGHTS
from claas.core.errors import BadRequest
from claas.core.types import AdapterVersion
from tests.adapters.tiny import base_model, configs, logits, read_config, taught_adapter, with_adapter, write_config

CONFIGS = configs()
LLAMA = CONFIGS["llama"]
VERSION = AdapterVersion(lora_id="me/a", version=3, base_model="me/base", created_at=datetime(2026, 5, 4, 3, 2, 2, tzinfo=UTC))

Tensors = dict[str, torch.Tensor]


def _zip(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A version's folder as a store keeps it."""
    folder = tmp_path / "source"
    folder.mkdir()
    taught_adapter(folder, LLAMA)
    (folder / OPTIMIZER).write_bytes(b"moments")
    (folder / MANIFEST).write_bytes(b"{}")
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def _import(archive: bytes, folder: Path) -> Tensors:
    import_zip(archive, folder, config=LLAMA, base_model="the/served")
    tensors: Tensors = load_file(folder / WEIGHTS)
    return tensors


def _with(source: Path, change: Callable[[Tensors], Tensors] = lambda tensors: tensors, **config: Any) -> bytes:
    """The source as a zip, its tensors and config changed."""
    write_config(source, config)
    return _zip({CONFIG: (source / CONFIG).read_bytes(), WEIGHTS: save(change(load_file(source / WEIGHTS)))})


def _refused(archive: bytes, folder: Path) -> str:
    with pytest.raises(BadRequest) as caught:
        import_zip(archive, folder, config=LLAMA, base_model="the/served")
    assert list(folder.iterdir()) == []
    assert caught.value.param == "archive"
    assert str(folder.parent) not in caught.value.message
    return caught.value.message


# --- Out ---


def test_peft_loads_what_is_exported_and_says_the_same(source: Path, tmp_path: Path) -> None:
    (tmp_path / "unpacked").mkdir()
    with zipfile.ZipFile(io.BytesIO(export_zip(source, VERSION))) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path / "unpacked")
    model, report = with_adapter(LLAMA, tmp_path / "unpacked")
    assert report.unexpected_keys == []
    assert torch.equal(logits(model), logits(with_adapter(LLAMA, source)[0]))
    assert not torch.equal(logits(model), logits(base_model(LLAMA)))


def test_the_optimizer_and_the_manifest_stay_here(source: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(export_zip(source, VERSION))) as archive:
        assert archive.namelist() == ["README.md", CONFIG, WEIGHTS]
        card = archive.read("README.md").decode()
    assert 'base_model: "me/base"' in card
    assert "me/a, version 3" in card
    assert "library_name: peft" in card


def test_the_same_version_exports_to_the_same_bytes(source: Path) -> None:
    assert export_zip(source, VERSION) == export_zip(source, VERSION)


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("/home/me/secret/smol", "smol"),
        ("C:\\Users\\me\\smol", "smol"),
        ("./models/smol", "smol"),
        ("../models/smol", "smol"),
        ("~/models/smol", "smol"),
    ],
)
def test_no_path_of_this_machine_goes_out(source: Path, base: str, shown: str) -> None:
    write_config(source, {"base_model_name_or_path": base})
    exported = export_zip(source, VERSION.model_copy(update={"base_model": base}))
    with zipfile.ZipFile(io.BytesIO(exported)) as archive:
        assert json.loads(archive.read(CONFIG))["base_model_name_or_path"] == shown
        everything = b"".join(archive.read(name) for name in archive.namelist())
    assert base == shown or base.encode() not in everything


# --- In ---


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_exported_comes_in_as_it_was(name: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    tensors = taught_adapter(source, CONFIGS[name])
    import_zip(export_zip(source, VERSION), target, config=CONFIGS[name], base_model="the/served")
    imported = load_file(target / WEIGHTS)
    assert imported.keys() == tensors.keys()
    assert all(torch.equal(imported[key], tensors[key]) for key in tensors)
    assert torch.equal(logits(with_adapter(CONFIGS[name], target)[0]), logits(with_adapter(CONFIGS[name], source)[0]))
    assert read_config(target)["base_model_name_or_path"] == "the/served"
    assert sorted(path.name for path in target.iterdir()) == [CONFIG, WEIGHTS]


def test_what_peft_itself_saved_comes_in(source: Path, target: Path, tmp_path: Path) -> None:
    model, _ = with_adapter(LLAMA, source)
    model.save_pretrained(str(tmp_path / "saved"), selected_adapters=["default"], save_embedding_layers=False)
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    _import(_zip(files), target)
    assert torch.equal(logits(with_adapter(LLAMA, target)[0]), logits(model))


@pytest.mark.parametrize("folder", ["", "my adapter/"])
def test_the_files_may_lie_in_one_folder_among_others(source: Path, target: Path, folder: str) -> None:
    files = {folder + name: (source / name).read_bytes() for name in (CONFIG, WEIGHTS, OPTIMIZER)}
    imported = _import(_zip(files | {"__MACOSX/._" + CONFIG: b"junk", "../evil.txt": b"junk", "/evil.txt": b"junk"}), target)
    assert imported.keys() == load_file(source / WEIGHTS).keys()
    assert sorted(path.name for path in target.iterdir()) == [CONFIG, WEIGHTS]
    assert not list(target.parent.glob("evil*"))


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace(".weight", ".default.weight"),
    ],
)
def test_keys_of_other_tools_get_pefts_names(source: Path, target: Path, rename: Callable[[str], str]) -> None:
    imported = _import(_with(source, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()}), target)
    assert imported.keys() == load_file(source / WEIGHTS).keys()
    assert torch.equal(logits(with_adapter(LLAMA, target)[0]), logits(with_adapter(LLAMA, source)[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_in_as_float32(source: Path, target: Path, dtype: torch.dtype) -> None:
    imported = _import(_with(source, lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()}), target)
    for key, tensor in load_file(source / WEIGHTS).items():
        assert imported[key].dtype == torch.float32
        assert torch.equal(imported[key], tensor.to(dtype).float())


def test_an_adapter_of_some_layers_keeps_to_these(source: Path, target: Path) -> None:
    archive = _with(
        source, lambda tensors: {key: tensor for key, tensor in tensors.items() if "layers.1" in key}, target_modules=".*layers.1.*proj"
    )
    imported = _import(archive, target)
    assert len(imported) == 14
    assert all(name.startswith("model.layers.1.") for name in read_config(target)["target_modules"])
    model, report = with_adapter(LLAMA, target)
    assert report.unexpected_keys == []
    assert {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name} == {
        key.split(".lora_")[0] for key in imported
    }


def test_a_fractional_alpha_is_kept(source: Path, target: Path) -> None:
    _import(_with(source, lora_alpha=5.5), target)
    assert read_config(target)["lora_alpha"] == 5.5
    _import(_with(source, lora_alpha=8.0), target)
    assert read_config(target)["lora_alpha"] == 8


# --- Refused ---


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["x"]),
        ("alora_invocation_tokens", [1]),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("r", 0),
        ("r", 257),
        ("r", "four"),
        ("r", None),
        ("lora_alpha", 0),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
    ],
)
def test_a_config_that_means_anything_but_plain_lora_is_refused_by_name(source: Path, target: Path, field: str, value: Any) -> None:
    assert repr(field) in _refused(_with(source, **{field: value}), target)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b"[" * 100_000, b'{"r": 4'])
def test_a_config_that_is_none_is_refused(source: Path, target: Path, content: bytes) -> None:
    _refused(_zip({CONFIG: content, WEIGHTS: (source / WEIGHTS).read_bytes()}), target)


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: {k: v for k, v in t.items() if k != Q_A}, "only one of"),
        (lambda t: {}, "no weights"),
        (lambda t: t | {Q_A: torch.zeros(4, 63)}, "shape (4, 63)"),
        (lambda t: t | {Q_A: torch.zeros(5, 64)}, "rank 4 need (4, 64)"),
        (lambda t: t | {Q_A: torch.zeros(64, 4)}, "shape (64, 4)"),
        (lambda t: t | {Q_A: torch.zeros(4, 64, 1)}, "shape (4, 64, 1)"),
        (lambda t: t | {Q_A: torch.full((4, 64), float("nan"))}, "not finite"),
        (lambda t: t | {Q_A: torch.full((4, 64), float("inf"), dtype=torch.bfloat16)}, "not finite"),
        (lambda t: t | {Q_A: torch.zeros(4, 64, dtype=torch.int8)}, "float32"),
        (lambda t: t | {Q_A: torch.zeros(4, 64, dtype=torch.float64)}, "float32"),
        (lambda t: t | {Q_A.removeprefix("base_model.model."): torch.zeros(4, 64)}, "twice"),
        (lambda t: t | {Q_A.replace("layers.0", "layers.2"): torch.zeros(4, 64)}, "layers.2"),
        (lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}, "lm_head"),
        (lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 200)}, "embed_tokens"),
        (lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(200, 64)}, "lm_head"),
        (lambda t: t | {Q_A.replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(64)}, "magnitude"),
    ],
)
def test_weights_that_do_not_fit_are_refused(source: Path, target: Path, change: Callable[[Tensors], Tensors], told: str) -> None:
    assert told in _refused(_with(source, change), target)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 100, b"\x80\x04\x95pickle"])
def test_weights_that_are_not_safetensors_are_refused(source: Path, target: Path, content: bytes) -> None:
    assert "safetensors" in _refused(_zip({CONFIG: (source / CONFIG).read_bytes(), WEIGHTS: content}), target)


def test_cut_weights_are_refused(source: Path, target: Path) -> None:
    weights = (source / WEIGHTS).read_bytes()
    assert "safetensors" in _refused(_zip({CONFIG: (source / CONFIG).read_bytes(), WEIGHTS: weights[:-1]}), target)


def test_an_adapter_of_another_model_is_refused(target: Path, tmp_path: Path) -> None:
    (tmp_path / "qwen").mkdir()
    taught_adapter(tmp_path / "qwen", CONFIGS["qwen3"])
    assert "base model" in _refused(export_zip(tmp_path / "qwen", VERSION), target)


@pytest.mark.parametrize(
    "names",
    [
        (),
        (CONFIG,),
        (WEIGHTS,),
        (CONFIG, "adapter_model.bin"),
        (CONFIG, f"a/{WEIGHTS}"),
        (f"a/{CONFIG}", f"b/{WEIGHTS}"),
        (f"a/b/{CONFIG}", f"a/b/{WEIGHTS}"),
        (f"../{CONFIG}", f"../{WEIGHTS}"),
        (f"/{CONFIG}", f"/{WEIGHTS}"),
        (CONFIG, WEIGHTS, f"a/{CONFIG}"),
    ],
)
def test_a_zip_laid_out_otherwise_is_refused(source: Path, target: Path, names: tuple[str, ...]) -> None:
    content = {CONFIG: (source / CONFIG).read_bytes(), WEIGHTS: (source / WEIGHTS).read_bytes()}
    _refused(_zip({name: content.get(name.rpartition("/")[2], b"") for name in names}), target)


@pytest.mark.parametrize("archive", [b"", b"PK", b"no zip at all", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_zip_is_refused(target: Path, archive: bytes) -> None:
    _refused(archive, target)


@pytest.mark.parametrize(("name", "size"), [(CONFIG, 30_000_000), (WEIGHTS, 90_000_000)])
def test_a_bomb_is_refused_before_it_goes_off(source: Path, target: Path, name: str, size: int) -> None:
    content = {CONFIG: (source / CONFIG).read_bytes(), WEIGHTS: (source / WEIGHTS).read_bytes()}
    bomb = _zip(content | {name: bytes(size)})
    assert len(bomb) < 200_000
    tracemalloc.start()
    try:
        assert "larger than any" in _refused(bomb, target)
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


def test_a_list_of_files_without_end_is_refused_before_it_is_read(target: Path) -> None:
    assert "more than 1000 files" in _refused(_zip({str(n): b"" for n in range(1001)}), target)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_an_unusual_compression_is_refused(source: Path, target: Path, method: int) -> None:
    content = {CONFIG: (source / CONFIG).read_bytes(), WEIGHTS: (source / WEIGHTS).read_bytes()}
    assert "deflate" in _refused(_zip(content, method), target)


def test_a_name_that_is_not_utf_8_is_refused(source: Path, target: Path) -> None:
    archive = _zip({CONFIG: (source / CONFIG).read_bytes(), WEIGHTS: (source / WEIGHTS).read_bytes(), "é": b""})
    _refused(archive.replace("é".encode(), b"\xc3\x28"), target)


def test_an_offset_before_the_beginning_is_refused(source: Path, target: Path) -> None:
    archive = bytearray(_zip({CONFIG: (source / CONFIG).read_bytes(), WEIGHTS: (source / WEIGHTS).read_bytes()}))
    end = archive.rfind(b"PK\x05\x06")
    archive[end + 16 : end + 20] = (2**31).to_bytes(4, "little")  # where the list of files is said to begin
    _refused(bytes(archive), target)


def test_an_encrypted_zip_is_refused(source: Path, target: Path) -> None:
    archive = bytearray(_zip({CONFIG: (source / CONFIG).read_bytes(), WEIGHTS: (source / WEIGHTS).read_bytes()}))
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = archive.find(signature)
        while at >= 0:
            archive[at + flags] |= 1
            at = archive.find(signature, at + 1)
    assert "password" in _refused(bytes(archive), target)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.integers(0),
    value=st.integers(0, 255),
    method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2]),
    data=st.data(),
)
def test_a_damaged_archive_is_refused_or_imported_never_worse(
    source: Path, tmp_path: Path, at: int, value: int, method: int, data: st.DataObject
) -> None:
    whole = bytearray(_zip({CONFIG: (source / CONFIG).read_bytes(), WEIGHTS: (source / WEIGHTS).read_bytes()}, method))
    headers = st.integers(0, 120) | st.integers(len(whole) - 300, len(whole) - 1)
    whole[data.draw(headers | st.just(at % len(whole)))] = value
    folder = tmp_path / "damaged"
    folder.mkdir(exist_ok=True)
    try:
        import_zip(bytes(whole), folder, config=LLAMA, base_model="b")
    except BadRequest:
        return
    assert load_file(folder / WEIGHTS).keys() == load_file(source / WEIGHTS).keys()
