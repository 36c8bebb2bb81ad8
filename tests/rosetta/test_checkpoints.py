"""rosetta's checkpoint folders: what is read, what is refused, and the command that converts them."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from rosetta_fixtures import FOLDER, needs_fixtures
from rosetta_stand_in import C2CProjector

import c2c_kernels as c2c
from c2c_kernels.cli import main
from c2c_kernels.fuser_layers import FuserShape
from c2c_kernels.integrations.rosetta import CheckpointError, load_checkpoint, save_checkpoint

ARGUMENTS = {
    "source_dim": 8, "target_dim": 6, "source_num_heads": 3, "target_num_heads": 2, "intermediate_dim": 24,
    "hidden_dim": 16, "num_layers": 4, "dropout": 0.2,
}  # fmt: skip
MAPS = {"0": {"1": {"0": [[2, 0]], "1": [[3, 1], [0, 0]]}, "2": {"1": [[0, 2]]}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of three projectors for two sharers."""
    made = tmp_path / "checkpoint"
    made.mkdir()
    for number in range(3):
        projector = C2CProjector(**ARGUMENTS)
        with torch.no_grad():
            projector.key_gate_logit.fill_(0.5)
            projector.gate_temperature.fill_(0.125)
        torch.save(projector.state_dict(), made / f"projector_{number}.pt")
        described = {"class": "C2CProjector", "init_args": {**ARGUMENTS, "dtype": "torch.bfloat16"}}
        (made / f"projector_{number}.json").write_text(json.dumps(described))
    (made / "projector_config.json").write_text(json.dumps(MAPS))
    return made


def states(folder: Path) -> list[dict]:
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob("projector_*.pt"))]


def test_reads_maps_shapes_and_weights(folder):
    fusers = load_checkpoint(folder)
    assert list(fusers) == [1, 2]
    # Of several pairs the first counts.
    assert fusers[1].layer_map == {0: 2, 1: 3} and fusers[2].layer_map == {1: 0}
    assert fusers[1].dropout == 0.2 and fusers[1].gate_temperature == 0.125 and not fusers[1].training
    assert fusers[1].origin == str(folder)
    source, target = (
        (torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)),
        (torch.randn(2, 2, 5, 6), torch.randn(2, 2, 5, 6)),
    )
    theirs = C2CProjector(**ARGUMENTS)
    theirs.load_state_dict(states(folder)[1])
    for mine, wanted in zip(fusers[1][1](target, source), theirs(source, target), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_round_trip(folder, tmp_path):
    save_checkpoint(load_checkpoint(folder), tmp_path / "again")
    assert json.loads((tmp_path / "again/projector_config.json").read_text()) == {
        "0": {"1": {"0": [[2, 0]], "1": [[3, 1]]}, "2": {"1": [[0, 2]]}}
    }
    for mine, theirs in zip(states(tmp_path / "again"), states(folder), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    written = json.loads((tmp_path / "again/projector_2.json").read_text())
    assert written["class"] == "C2CProjector" and written["init_args"].items() >= ARGUMENTS.items()
    with pytest.raises(CheckpointError, match=r"projector_config\.json exists: name a folder without a checkpoint"):
        save_checkpoint(load_checkpoint(folder), tmp_path / "again")


def edit_json(name, change):
    def edit(folder):
        path = folder / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return edit


def edit_state(name, change):
    def edit(folder):
        torch.save(change(torch.load(folder / name, weights_only=True)), folder / name)

    return edit


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/nonexistent/never"),))


def truncate(name):
    def edit(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return edit


BAD = {
    "missing": (
        edit_state("projector_1.pt", lambda s: {k: v for k, v in s.items() if k != "value_in.bias"}),
        r"projector_1\.pt has no tensor value_in\.bias: wanted one of shape \(16,\)",
    ),
    "extra": (
        edit_state("projector_1.pt", lambda s: {**s, "more.weight": torch.zeros(2, 3)}),
        r"projector_1\.pt has an extra tensor more\.weight of shape \(2, 3\)",
    ),
    "misshapen": (
        edit_state("projector_0.pt", lambda s: {**s, "key_in.weight": torch.zeros(16, 30)}),
        r"projector_0\.pt: key_in\.weight has shape \(16, 30\), wanted \(16, 36\)",
    ),
    "no tensor": (
        edit_state("projector_0.pt", lambda s: {**s, "key_in.weight": 3.0}),
        r"projector_0\.pt: key_in\.weight is a float, wanted a tensor",
    ),
    "a list": (
        edit_state("projector_0.pt", lambda s: list(s.values())),
        r"projector_0\.pt holds a list, wanted a dict",
    ),
    "nan": (
        edit_state("projector_2.pt", lambda s: {**s, "key_in.bias": torch.full((16,), torch.nan)}),
        r"projector_2\.pt: key_in\.bias has infinite or NaN values",
    ),
    **{
        f"{kind} tensor": (
            edit_state("projector_0.pt", lambda s, change=change: {**s, "key_in.weight": change(s["key_in.weight"])}),
            rf"projector_0\.pt: key_in\.weight is .*{kind}.*, wanted plain dense CPU tensors",
        )
        for kind, change in {
            "sparse_coo": torch.Tensor.to_sparse,
            "sparse_csr": torch.Tensor.to_sparse_csr,
            "meta": lambda t: t.to("meta"),
            "nested": lambda t: torch.nested.nested_tensor([t, t]),
        }.items()
    },
    "temperature": (
        edit_state("projector_2.pt", lambda s: {**s, "gate_temperature": torch.tensor(0.0)}),
        r"projector_2\.pt: gate_temperature must be a number above 0, got 0\.0",
    ),
    "pickle": (
        lambda folder: (folder / "projector_1.pt").write_bytes(pickle.dumps({"key_in.weight": Evil()}, protocol=2)),
        r"projector_1\.pt holds more than plain tensors, or is damaged",
    ),
    "truncated": (truncate("projector_1.pt"), r"projector_1\.pt (is truncated|holds more than plain tensors, or)"),
    "empty": (lambda folder: (folder / "projector_1.pt").write_bytes(b""), r"projector_1\.pt (is truncated|holds)"),
    "no pt": (lambda folder: (folder / "projector_2.pt").unlink(), r"projector_2\.pt does not exist"),
    "no json": (lambda folder: (folder / "projector_2.json").unlink(), r"projector_2\.json does not exist"),
    "truncated json": (truncate("projector_0.json"), r"projector_0\.json is truncated, damaged or no JSON"),
    "class": (
        edit_json("projector_1.json", lambda d: {**d, "class": "AllInOneProjector"}),
        r"projector_1\.json is a projector of class AllInOneProjector, supported is C2CProjector",
    ),
    "argument": (
        edit_json("projector_1.json", lambda d: {**d, "init_args": {**d["init_args"], "activation": "silu"}}),
        r"projector_1\.json has init_args that C2CProjector does not have: activation",
    ),
    "no argument": (
        edit_json("projector_1.json", lambda d: {**d, "init_args": {"source_dim": 8}}),
        r"projector_1\.json has no target_dim in init_args",
    ),
    "bad argument": (
        edit_json("projector_1.json", lambda d: {**d, "init_args": {**d["init_args"], "num_layers": 2}}),
        r"projector_1\.json: num_layers must be an integer of at least 3, got 2",
    ),
    **{
        f"bad {name}": (
            edit_json(
                "projector_0.json",
                lambda d, name=name, value=value: {**d, "init_args": {**d["init_args"], name: value}},
            ),
            match,
        )
        for name, value, match in (
            (
                "hidden_dim",
                2**45,
                r"projector_0\.pt: key_in\.weight has shape \(16, 36\), wanted \(35184372088832, 36\)",
            ),
            ("num_layers", 200_000, r"projector_0\.pt has no tensor key_proj_mlp2\.blocks\.2\.norm\.weight"),
            ("anneal_steps", 0, r"projector_0\.json: steps of annealing must be an integer of at least 1, got 0"),
            ("initial_temperature", "x", r"projector_0\.json: initial temperature must be a number above 0, got 'x'"),
            ("dropout", None, r"projector_0\.json: dropout must be at least 0 and below 1, got None"),
        )
    },
    "shapes differ": (
        edit_json("projector_1.json", lambda d: {**d, "init_args": {**d["init_args"], "hidden_dim": 8}}),
        r"projector_1\.json has FuserShape.*, others FuserShape",
    ),
    "no map": (lambda folder: (folder / "projector_config.json").unlink(), r"projector_config\.json does not exist"),
    "negative layer": (
        edit_json("projector_config.json", lambda m: {"0": {"1": {"0": [[-1, 0]]}}}),
        r"projector_config\.json, sharer 1, maps receiver layer 0 to sharer layer -1: wanted integers of at least 0",
    ),
    "no layers": (edit_json("projector_config.json", lambda m: {"0": {"1": {}}}), "maps no layers to receiver 0"),
    "not a map": (edit_json("projector_config.json", lambda m: {"0": {"1": {"0": 3}}}), "is not {receiver: {sharer:"),
    "sharer 0": (
        edit_json("projector_config.json", lambda m: {"0": {"0": m["0"]["1"]}}),
        "has a sharer 0, wanted numbers",
    ),
    "layer twice": (
        edit_json("projector_config.json", lambda m: {"0": {"1": {"0": [[1, 0]], "00": [[2, 1]]}}}),
        "a number is there twice: 0, 00",
    ),
    "name twice": (
        lambda folder: (folder / "projector_config.json").write_text('{"0": {}, "0": {"1": {"0": [[1, 0]]}}}'),
        r"projector_config\.json is truncated, damaged or no JSON: '0' is there twice",
    ),
    "projector": (
        edit_json("projector_config.json", lambda m: {"0": {"1": {"0": [[1, "../x"]]}}}),
        "maps layer 0 to projector '../x': wanted an integer of at least 0",
    ),
    "deep": (
        lambda folder: (folder / "projector_config.json").write_text("[" * 100_000),
        r"projector_config\.json is truncated, damaged or no JSON",
    ),
    "receiver": (edit_json("projector_config.json", lambda m: {"1": m["0"]}), r"has no receiver 0, it has \[1\]"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(folder, name):
    change, match = BAD[name]
    change(folder)
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(folder)


def test_what_could_not_be_read_is_not_written(folder, tmp_path):
    fusers, out = load_checkpoint(folder), tmp_path / "out"
    uneven = c2c.C2CFuser(FuserShape(3, 8, 5, 2, 6, 6, hidden=16, inner=24), {0: 0})
    double = copy.deepcopy(fusers[2]).double()
    for given, match in (
        ({}, "fusers is empty"),
        ({1: fusers[1], 0: fusers[2]}, "fusers has a sharer 0, wanted integers of at least 1"),
        ({1: fusers[1], 2: uneven}, "one head dim for keys and values, the fuser of sharer 2 two"),
        ({1: fusers[1], 2: double}, "the fuser of sharer 2 cannot be written, layer 1: .* is torch.float64"),
    ):
        with pytest.raises(CheckpointError, match=match):
            save_checkpoint(given, out)
    with pytest.raises(CheckpointError, match="receiver must be an integer of at least 0, got -1"):
        save_checkpoint(fusers, out, receiver=-1)
    assert not out.exists()


def test_other_files_are_not_overwritten(folder, tmp_path, monkeypatch):
    fusers, out = load_checkpoint(folder), tmp_path / "out"
    out.mkdir()
    (out / "projector_2.pt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"projector_2\.pt exists: name a folder without a checkpoint"):
        save_checkpoint(fusers, out)
    assert [path.name for path in out.iterdir()] == ["projector_2.pt"]
    (out / "projector_2.pt").rename(out / "notes.pt")

    def full(*arguments):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(fusers, out)
    assert [path.name for path in out.iterdir()] == ["notes.pt"]
    save_checkpoint(fusers, out)
    assert list(load_checkpoint(out)) == [1, 2] and (out / "notes.pt").read_text() == "mine"


def test_a_map_outside_of_the_layers_is_refused_with_the_models(folder):
    edit_json("projector_config.json", lambda m: {"0": {"1": {"0": [[7, 0]]}}})(folder)
    from types import SimpleNamespace

    receiver = SimpleNamespace(num_hidden_layers=2, num_attention_heads=2, head_dim=6)
    sharer = SimpleNamespace(num_hidden_layers=4, num_attention_heads=3, head_dim=8)
    with pytest.raises(
        ValueError, match=r"checkpoint maps receiver layer 0 to sharer layer 7: the sharer has layers 0..3"
    ):
        load_checkpoint(folder)[1].check_models(receiver, sharer)


class TestConvert:
    def test_there_and_back(self, folder, tmp_path, capsys):
        files = [str(tmp_path / f"{number}.safetensors") for number in (1, 2)]
        for number, file in enumerate(files, 1):
            assert main(["convert", str(folder), "--sharer", str(number), "--output", file, "--sharer-name", "S"]) == 0
        assert "2 layers, 3 x 8 to 2 x 6, 2 of 4 gates open" in capsys.readouterr().out
        assert c2c.C2CFuser.load(files[0]).sharer.name == "S"
        assert main(["convert", *files, "--output", str(tmp_path / "back")]) == 0
        for mine, theirs in zip(states(tmp_path / "back"), states(folder), strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)

    def test_dtype(self, folder, tmp_path):
        out = tmp_path / "f.safetensors"
        assert main(["convert", str(folder), "--sharer", "1", "--output", str(out), "--dtype", "bfloat16"]) == 0
        assert next(c2c.C2CFuser.load(out).parameters()).dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (["{folder}", "--output", "{out}"], "has fusers for sharers [1, 2]: name one with --sharer"),
            (
                ["{folder}", "--output", "{out}", "--sharer", "3"],
                "has fusers for sharers [1, 2]: name one with --sharer",
            ),
            (["{folder}", "--output", "{folder}"], "is a folder: a file name that ends in .safetensors is wanted"),
            (["{folder}", "{folder}", "--output", "{out}"], "one folder, or safetensors files, are wanted"),
            (["{folder}/none", "--output", "{out}"], "none does not exist"),
            (["{folder}/projector_0.pt", "--output", "{out}"], "is truncated, damaged or no safetensors file"),
            (["{folder}/projector_0.pt", "--output", "{out}", "--dtype", "float16"], "--dtype goes with a checkpoint"),
        ],
    )
    def test_what_is_refused(self, folder, tmp_path, capsys, arguments, match):
        out = tmp_path / "f.safetensors"
        assert main(["convert", *(one.format(folder=folder, out=out) for one in arguments)]) == 1
        assert match in capsys.readouterr().err and not out.exists()

    def test_sharer_0_of_a_file_is_not_ignored(self, folder, tmp_path, capsys):
        file, back = str(tmp_path / "f.safetensors"), str(tmp_path / "back")
        assert main(["convert", str(folder), "--sharer", "1", "--output", file]) == 0
        assert main(["convert", file, "--output", back, "--sharer", "0"]) == 1
        assert "--sharer goes with a checkpoint folder" in capsys.readouterr().err and not Path(back).exists()

    @needs_fixtures
    def test_fixtures(self, tmp_path, capsys):
        out = tmp_path / "f.safetensors"
        assert main(["convert", str(FOLDER / "ckpt_A"), "--output", str(out)]) == 0
        assert main(["convert", str(FOLDER / "ckpt_AB_aio"), "--output", str(out)]) == 1
        assert "class AllInOneProjector" in capsys.readouterr().err
        shutil.copytree(FOLDER / "ckpt_A_closed", tmp_path / "closed")
        assert main(["convert", str(tmp_path / "closed"), "--output", str(out)]) == 0
        assert "every gate of the fuser" in capsys.readouterr().err
