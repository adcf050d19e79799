"""MedicalSeg's files: inheritance, and each bad file a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from segrt.errors import InputError, SegrtError, SpecError
from segrt.train.medicalseg_yaml import MOST_BYTES, Document, read_document


def write(folder: Path, **files: str) -> Path:
    """Files configs/NAME.yml, `a__b` for a folder a; the first one comes out."""
    paths = [folder / "configs" / (name.replace("_base_x", "_base_/").replace("__", "/") + ".yml") for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return paths[0]


def read(folder: Path, **files: str) -> Document:
    return read_document(write(folder, **files))


def test_a_file_beats_its_base_key_by_key(tmp_path: Path) -> None:
    document = read(
        tmp_path,
        amos__vnet="_base_: amos.yml\noptimizer: {weight_decay: 2}\nlist: [3]\n",
        amos__amos="_base_: ../_base_/all.yml\noptimizer: {type: sgd, weight_decay: 1}\nlist: [1, 2]\n",
        _base_xall="data_root: data/\nlist: [0]\n",
    )
    assert document.values == {"data_root": "data/", "list": [3], "optimizer": {"type": "sgd", "weight_decay": 2}}
    assert [path.name for path in document.files] == ["vnet.yml", "amos.yml", "all.yml"]
    assert document.root == tmp_path / "configs"


def test_inherited_false_cuts_a_mapping_off(tmp_path: Path) -> None:
    base = "loss: {coef: [1], types: [a]}\nmodel: {type: VNet, deeper: {a: 1}}\n"
    own = "_base_: base.yml\nloss: {_inherited_: False, coef: [2]}\nmodel: {deeper: {_inherited_: False, b: 2}}\n"
    assert read(tmp_path, own=own, base=base).values == {"loss": {"coef": [2]}, "model": {"type": "VNet", "deeper": {"b": 2}}}
    assert read(tmp_path, own="_base_: base.yml\n_inherited_: False\niters: 3\n", base=base).values == {"iters": 3}


def test_a_file_inherits_from_another_and_not_from_itself(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"_base_ leads back to where it began \(a.yml -> b.yml -> a.yml\)"):
        read(tmp_path, a="_base_: b.yml\n", b="_base_: a.yml\n")
    with pytest.raises(InputError, match=r"\(a.yml -> a.yml\); a file cannot inherit from itself"):
        read(tmp_path, a="_base_: ./a.yml\n")


def test_a_base_lies_below_configs_or_the_folder_above(tmp_path: Path) -> None:
    (tmp_path / "secret.yml").write_text("password: 1\n")
    with pytest.raises(InputError, match=r"_base_: '../../secret.yml' leads out of .*configs; .*--medicalseg-root"):
        read(tmp_path, amos__a="_base_: ../../secret.yml\n")
    loose = tmp_path / "mine" / "deep" / "a.yml"
    loose.parent.mkdir(parents=True)
    loose.write_text("_base_: ../b.yml\n")
    (tmp_path / "mine" / "b.yml").write_text("iters: 1\n")
    assert read_document(loose).values == {"iters": 1}
    loose.write_text("_base_: ../../secret.yml\n")
    with pytest.raises(InputError, match="leads out of"):
        read_document(loose)
    assert read_document(loose, root=tmp_path).values == {"password": 1}
    with pytest.raises(InputError, match=r"does not lie in .*other, the folder its configurations may come from"):
        read_document(loose, root=tmp_path / "other")


@pytest.mark.parametrize("text", ["/etc/all.yml", "C:\\all.yml", "\\\\host\\all.yml"])
def test_a_base_is_relative(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="expected a path relative to this file, got"):
        read(tmp_path, a=f"_base_: '{text}'\n")


def test_a_file_named_from_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, amos__a="_base_: ../_base_/b.yml\n", _base_xb="iters: 1\n")
    for folder, name in (("configs/amos", "a.yml"), ("configs/_base_", "../amos/a.yml"), (".", "configs/amos/../amos/a.yml")):
        monkeypatch.chdir(tmp_path / folder)
        assert read_document(Path(name)).values == {"iters": 1}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shortcut").symlink_to("configs/amos")
    assert read_document(Path("shortcut/a.yml")).root == tmp_path / "configs"


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "secret.yml").write_text("password: 1\n")
    path = write(tmp_path, a="_base_: link.yml\n")
    (path.parent / "link.yml").symlink_to(tmp_path / "secret.yml")
    with pytest.raises(InputError, match=r"'link.yml' leads out of"):
        read_document(path)
    path.write_text("_base_: folder/secret.yml\n")
    (path.parent / "folder").symlink_to(tmp_path)
    with pytest.raises(InputError, match="leads out of"):
        read_document(path)


BAD = {
    "no YAML": ("iters: [1", r"a.yml, line \d+: no YAML of plain values"),
    "an object": ("iters: !!python/object/apply:os.system [echo]", "no YAML of plain values .*could not determine a constructor"),
    "a word": ("VNet", "expected keys with values, such as 'iters: 30000', got str"),
    "nothing": ("", "expected keys with values, .* got NoneType"),
    "a list": ("- 1\n- 2", "got list"),
    "a key twice": ("iters: 1\nbatch_size: 2\niters: 3\n", r"a.yml, line 3: key 'iters' is there twice; keep one of them"),
    "a key twice, deeper": ("model:\n  - {type: a, type: b}\n", "line 2: key 'type' is there twice"),
    "a number as key": ("model: {1: 2}\n", "expected names as keys, got 1"),
    "an unhashable key": ("? [1]\n: 2\n", "no YAML of plain values"),
    "many levels": ("a: " + "[" * 30 + "]" * 30, "more than 16 levels, so it is no configuration"),
    "endless levels": ("a: " + "[" * 100_000, "no YAML of plain values"),
    "an endless alias": ("a: &a [*a]", "more than 16 levels"),
    "a billion values": (
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in ["ab", "bc", "cd", "de", "ef", "fg"]),
        "more than 10000 values",
    ),
    "a large file": ("a: " + "b" * MOST_BYTES, "larger than 1000 kB"),
    "a day there is not": ("a: 2001-99-99\n", "no YAML of plain values"),
    "two bases": ("_base_: [a.yml, b.yml]\n", r"_base_: expected the name of one .yml or .yaml file, got \['a.yml', 'b.yml'\]"),
    "no name": ("_base_:\n", "_base_: expected the name of one .yml or .yaml file, got None"),
    "no YAML file": ("_base_: passwd\n", "_base_: expected the name of one .yml or .yaml file, got 'passwd'"),
    "a byte no name has": ('_base_: "a\\0.yml"\n', "_base_: expected the name of one .yml or .yaml file"),
    "a key that paints": ('"\\e[2J": 1\n', r"expected names as keys, got '\\x1b\[2J'"),
    "a long key": ("a" * 200 + ": 1\n", "expected names as keys, got 'aaaaaaaaaaaa"),
    "no such base": ("_base_: missing.yml\n", "missing.yml cannot be read .*No such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_a_sentence(tmp_path: Path, name: str) -> None:
    text, sentence = BAD[name]
    with pytest.raises(SegrtError, match=sentence) as error:
        read(tmp_path, a=text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.yml cannot be read \(No such file or directory\); expected a MedicalSeg configuration"):
        read_document(tmp_path / "none.yml")
    (tmp_path / "latin.yml").write_bytes("name: café".encode("latin-1"))
    with pytest.raises(SpecError, match="no YAML of plain values"):
        read_document(tmp_path / "latin.yml")


def test_anchors_and_merges_are_plain_values(tmp_path: Path) -> None:
    text = "train: &t {a: 1, b: 2}\nval: {<<: *t, a: 3}\n"
    assert read(tmp_path, a=text).values == {"train": {"a": 1, "b": 2}, "val": {"a": 3, "b": 2}}
