"""Tuning without a GPU: launches are recorded, and a timer that is made up says how long they take."""

from __future__ import annotations

import json
import warnings
from contextlib import contextmanager

import pytest
import torch
from triton import testing
from triton.runtime.errors import OutOfResources

from c2c_kernels.backends.triton import attention, tiles_table, tuned, tuning
from c2c_kernels.backends.triton.launch import Launch, Target, executed_by
from c2c_kernels.backends.triton.offline import compiled
from c2c_kernels.backends.triton.tile import Tile, refusal
from c2c_kernels.cli import main, tune

GPU = Target("cuda", 90, "made-up GPU")
CPU = torch.device("cpu")
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """The tuning file of an empty cache folder."""
    monkeypatch.setenv("C2C_CACHE_DIR", str(tmp_path / "cache"))
    tuned.forget()
    yield tmp_path / "cache" / "triton-tiles.json"
    tuned.forget()


@pytest.fixture(autouse=True)
def _nothing_is_measured(monkeypatch):
    def measured(*arguments, **options):
        raise AssertionError("benchmarked")

    monkeypatch.setattr(testing, "do_bench", measured)


def tile_of(launch: Launch) -> Tile:
    names = launch.arguments
    tokens = names["TOKENS"][0] if "TOKENS" in names else names["BLOCK_N"]
    return Tile(names["BLOCK_M"], tokens, launch.warps, launch.stages)


@contextmanager
def recorded(target: Target, fits=lambda tile: True):
    """The launches of the block; those of tiles that do not fit raise as on a GPU."""
    launches: list[Launch] = []

    def take(launch: Launch) -> None:
        if {"BLOCK_N", "TOKENS"} & launch.arguments.keys() and not fits(tile_of(launch)):
            raise OutOfResources(300000, 232448, "shared memory")
        launches.append(launch)

    with executed_by(target, take):
        yield launches


def timer_for(launches: list[Launch], seconds):
    """A timer that takes a call's time from the tile of its first launch."""

    def timer(call) -> float:
        launches.clear()
        call()
        return seconds(tile_of(launches[0]))

    return timer


def far_from(goal: Tile):
    """A time that grows with every step away from `goal`."""
    return lambda tile: 1e-3 * sum(1 + abs(a.bit_length() - b.bit_length()) for a, b in zip(tile, goal, strict=True))


def tune_for(goal: Tile, kernel="prefill", dim=128, dtype=HALF, rows=0, fits=lambda tile: True) -> tuning.Tuned:
    with recorded(GPU, fits) as launches:
        return tuning.tune(CPU, kernel, dim, dtype, rows, timer_for(launches, far_from(goal)), tokens=512)


def attend(target: Target, q_len: int = 64, batch: int = 1, length: int = 700, dim: int = 128, dtype=HALF, mask=None):
    """The launches of a call of 4 heads of a KV head."""
    query = torch.empty(batch, 8, q_len, dim, dtype=dtype)
    key = torch.empty(batch, 2, length, dim, dtype=dtype)
    with recorded(target) as launches:
        attention.attend(query, key, key, [], mask, True, None, None, 0.1, None, None, None, None, False, False, dtype)
    return launches


def shipped_tile(dim: int) -> Tile:
    """Of prefill, where nothing was tuned."""
    return tiles_table.prefill_tile(tiles_table.Call(Target("cuda", 90), dim, HALF, 256, False, False))


@pytest.mark.parametrize(
    ("kernel", "rows", "goal"),
    [
        ("prefill", 0, Tile(64, 128, 4, 1)),
        ("decode", 16, Tile(16, 128, 2, 1)),
        ("decode", 64, Tile(64, 32, 8, 1)),
        ("backward", 0, Tile(32, 128, 4, 1)),
    ],
)
def test_the_fastest_tile_is_found_in_few_steps(kernel, rows, goal):
    found = tune_for(goal, kernel, rows=rows)
    assert found.best == goal != found.shipped
    assert found.best_seconds == pytest.approx(4e-3) and found.best_seconds < found.shipped_seconds
    assert found.tried < 30


def test_the_shipped_tile_stays_where_none_is_faster():
    with recorded(GPU):
        found = tuning.tune(CPU, "prefill", 128, HALF, 0, lambda call: 1e-3, tokens=512)
    assert found.best == found.shipped == shipped_tile(128)


def test_small_gains_are_noise():
    with recorded(GPU) as launches:
        timer = timer_for(launches, lambda tile: 1.00 if tile.tokens == 64 else 0.98)
        found = tuning.tune(CPU, "prefill", 128, HALF, 0, timer, tokens=512)
    assert found.best == found.shipped


def test_tiles_that_do_not_fit_are_passed_over():
    goal = Tile(64, 128, 4, 1)
    found = tune_for(goal, fits=lambda tile: tile.tokens < 128)
    assert found.best == goal._replace(tokens=64)
    wanted = r"prefill dim 128 bfloat16: the shipped Tile\(.*warps=8.*\) does not fit on made-up GPU: out of resource"
    with pytest.raises(ValueError, match=wanted):
        tune_for(goal, fits=lambda tile: tile.warps != 8)


@pytest.mark.parametrize("kernel", tuning.ROWS)
def test_tiles_must_fit_calls_with_every_option(kernel):
    """What fits the timed call alone would fail for a user with masks and windows."""
    rows = tuning.ROWS[kernel][0]
    with recorded(GPU) as launches:
        tuning._demanding_call(kernel, CPU, 64, HALF, rows)()
        first = launches[0].arguments
        assert first["SOFTCAP"] and first["window"] == 200 and first["query_positions"] is not None
        kinds = first["KINDS"]
        assert kinds[1] >> 6 & 3 == 2 and kinds[1] & 3 == 2
        launches.clear()
        tuning._call(kernel, CPU, 64, HALF, rows, 256)()
        assert launches[0].arguments["KINDS"][0] // 4**4 % 4**6 == 0  # neither mask nor anything after it but alignment


def test_calls_that_take_more_keep_the_tile_of_the_table():
    key = tuned.key_of("prefill", 128, HALF, 0, False)
    tuned.store(GPU, {key: Tile(64, 64, 8, 2)})
    mask = torch.zeros(1, 8, 64, 700)
    assert tile_of(attend(GPU)[0]) == Tile(64, 64, 8, 2) != shipped_tile(128)
    heavy = tiles_table.Call(Target("cuda", 90), 128, HALF, 256, False, True)
    assert tile_of(attend(GPU, mask=mask)[0]) == tiles_table.prefill_tile(heavy)


def test_what_was_found_is_kept_and_used(file):
    found = tune_for(Tile(64, 128, 4, 1))
    before = attend(GPU)
    assert tile_of(before[0]) == found.shipped
    assert tuned.store(GPU, {found.key: found.best}) == file
    assert [path.name for path in file.parent.iterdir() if path.name != f".{file.name}.lock"] == [file.name]
    after = attend(GPU)
    assert tile_of(after[0]) == found.best
    assert len(after) == len(before) == 1
    for other in (Target("cuda", 90, "another"), Target("cuda", 100, GPU.name), Target("cuda", 90)):
        assert tile_of(attend(other)[0]) == found.shipped
    assert tile_of(attend(GPU, dtype=torch.float16)[0]) == found.shipped
    assert tile_of(attend(GPU, dim=64)[0]) == shipped_tile(64)
    assert tile_of(attend(GPU, dim=100)[0]) == found.best  # padded to 128


def test_another_triton_has_tiles_of_its_own(monkeypatch):
    found = tune_for(Tile(64, 128, 4, 1))
    tuned.store(GPU, {found.key: found.best})
    monkeypatch.setattr(tuned.triton, "__version__", "99.0")
    assert tile_of(attend(GPU)[0]) == found.shipped


def test_neither_the_batch_nor_lengths_choose_a_tile_and_splits_stay():
    plain = attend(GPU, q_len=4)
    tuned.store(GPU, {tuned.key_of("decode", 128, HALF, 16, False): Tile(16, 128, 2, 1)})
    for batch, length in ((1, 700), (5, 700), (1, 5000)):
        split, combine = attend(GPU, q_len=4, batch=batch, length=length)
        assert tile_of(split) == Tile(16, 128, 2, 1) != tile_of(plain[0])
        assert split.arguments["SPLITS"] == combine.arguments["SPLITS"] == plain[0].arguments["SPLITS"]
    split, _ = attend(GPU, q_len=8)  # 32 rows: not tuned
    assert split.arguments["BLOCK_M"] == 32


def test_a_later_tuning_adds_to_the_file(file):
    prefill, decode = tuned.key_of("prefill", 64, HALF, 0, False), tuned.key_of("decode", 64, HALF, 32, False)
    tuned.store(GPU, {prefill: Tile(64, 64, 4, 2)})
    tuned.store(Target("hip", "gfx942", "other"), {prefill: Tile(32, 32, 4, 1)})
    tuned.store(GPU, {decode: Tile(32, 64, 4, 2)})
    tiles = tuned.read(file)[0]
    assert tiles[tuned.device_name(GPU)] == {str(prefill): Tile(64, 64, 4, 2), str(decode): Tile(32, 64, 4, 2)}
    assert len(tiles) == 2


def test_a_store_that_fails_leaves_the_old_file(file, monkeypatch):
    key = tuned.key_of("prefill", 64, HALF, 0, False)
    tuned.store(GPU, {key: Tile(64, 64, 4, 2)})
    before = file.read_bytes()

    def full(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(tuned.json, "dump", full)
    with pytest.raises(OSError, match="No space"):
        tuned.store(GPU, {key: Tile(32, 64, 4, 2)})
    assert file.read_bytes() == before
    assert {path.name for path in file.parent.iterdir()} == {file.name, f".{file.name}.lock"}


def entry(**fields) -> dict:
    return {"rows": 64, "tokens": 64, "warps": 4, "stages": 2} | fields


def content(name="prefill dim 128 bfloat16", tile=None, **fields) -> bytes:
    tiles = {tuned.device_name(GPU): {name: entry() if tile is None else tile}}
    return json.dumps({"format": 1, "tiles": tiles, **fields}).encode()


BROKEN = {
    "cut": content()[:-9],
    "empty": b"",
    "binary": bytes(range(256)),
    "nested": b"[" * 100000,
    "alien": b'{"name": "a package", "version": 3}',
    "list": b"[1, 2]",
    "newer": content(format=2),
    "no tiles": content(tiles=[]),
    "device": content(tiles={tuned.device_name(GPU): 3}),
    "kernel": content("prefil dim 128 bfloat16"),
    "dim": content("prefill dim many bfloat16"),
    "dtype": content("prefill dim 128 int8"),
    "tile": content(tile=[64, 64, 4, 2]),
    "field": content(tile=entry(blocks=3)),
    "missing": content(tile={"rows": 64}),
    "not a power of two": content(tile=entry(rows=48)),
    "too many tokens": content(tile=entry(tokens=256)),
    "text": content(tile=entry(warps="4")),
    "true": content(tile=entry(stages=True)),
    "fraction": content(tile=entry(tokens=64.0)),
    "huge": content("prefill dim 512 bfloat16", entry(rows=128)),
    "accumulators": content("prefill dim 256 float32", entry(tokens=128, stages=4)),
    "rows of decode": content("decode dim 128 bfloat16 rows 16", entry(rows=64)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_ignored_with_one_warning_and_written_anew(name, file):
    file.parent.mkdir()
    file.write_bytes(BROKEN[name])
    shipped = shipped_tile(128)
    with pytest.warns(RuntimeWarning, match=r"triton-tiles.json.* ignored.*c2c-kernels tune. writes it anew") as caught:
        assert [tile_of(attend(GPU)[0]) for _ in range(3)] == [shipped] * 3
    assert len(caught) == 1
    key = tuned.key_of("prefill", 128, HALF, 0, False)
    tuned.store(GPU, {key: Tile(64, 128, 4, 1)})
    assert tuned.read(file) == ({tuned.device_name(GPU): {str(key): Tile(64, 128, 4, 1)}}, "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tile_of(attend(GPU)[0]) == Tile(64, 128, 4, 1)


def test_good_tiles_beside_broken_ones_are_used(file):
    file.parent.mkdir()
    tiles = {"prefill dim 128 bfloat16": entry(), "prefill dim 64 bfloat16": entry(rows=48)}
    file.write_text(json.dumps({"format": 1, "tiles": {tuned.device_name(GPU): tiles}}))
    with pytest.warns(RuntimeWarning, match="1 of its tiles are ignored, the first: .*rows must be one of 16, 32"):
        assert tile_of(attend(GPU)[0]) == Tile(64, 64, 4, 2)


def test_without_a_gpu_the_file_is_not_read(file):
    file.parent.mkdir()
    file.write_bytes(b"broken")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(Target("cuda", 90))


@pytest.mark.parametrize("target", [Target("cuda", 80), Target("cuda", 90), Target("hip", "gfx942")], ids=str)
def test_shipped_tiles_are_such_as_a_file_may_name(target):
    for name, choose in tuned.SHIPPED.items():
        for dim in (16, 32, 64, 128, 256):
            for dtype in (HALF, torch.float32):
                for rows in (1, 16, 17, 64, 300) if name != "decode" else (1, 16, 17, 64):
                    tile = choose(tiles_table.Call(target, dim, dtype, rows, False, False))
                    assert refusal(tile, dim, dtype.itemsize, None) == "", (name, dim, dtype, rows)


def test_a_tuned_tile_compiles():
    tuned.store(GPU, {tuned.key_of("prefill", 64, HALF, 0, False): Tile(64, 32, 4, 2)})
    (launch,) = attend(GPU, dim=64)
    metadata = compiled(launch, Target("cuda", 90)).kernel.metadata
    assert metadata.num_warps == 4
    assert launch.arguments["BLOCK_M"] == 64


def test_the_command_tunes_what_is_asked_for(file, monkeypatch, capsys):
    monkeypatch.setattr(tune, "_device", lambda name: CPU)
    with recorded(GPU) as launches:
        timer = timer_for(launches, far_from(Tile(64, 32, 4, 2)))
        monkeypatch.setattr(tuning, "gpu_seconds", timer)
        assert main(["tune", "--kernel", "prefill", "--kernel", "decode", "--head-dim", "64"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"made-up GPU, cuda 90, triton {tuned.triton.__version__}\n")
    assert "prefill dim 64 bfloat16" in out and "rows 64, tokens 32, warps 4, stages 2: 4000.0 us" in out
    assert out.endswith(f"kept in {file}\n")
    names = {f"decode dim 64 bfloat16 rows {rows}" for rows in (16, 32, 64)} | {"prefill dim 64 bfloat16"}
    assert set(tuned.read(file)[0][tuned.device_name(GPU)]) == names


def test_the_command_says_what_was_wrong_with_the_file(file, monkeypatch, capsys):
    file.parent.mkdir()
    file.write_bytes(b"broken")
    monkeypatch.setattr(tune, "_device", lambda name: CPU)
    monkeypatch.setattr(tuning, "gpu_seconds", lambda call: 1e-3)
    with recorded(GPU):
        assert main(["tune", "--kernel", "prefill", "--head-dim", "64"]) == 0
    assert "is ignored, it cannot be read" in capsys.readouterr().out
    assert tuned.read(file)[1] == ""


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(tune, "_device", lambda name: CPU)
    monkeypatch.setattr(tuning, "gpu_seconds", lambda call: 1e-3)
    with recorded(GPU):
        assert main(["tune", "--kernel", "prefill", "--head-dim", "64"]) == 1
    assert capsys.readouterr().err.startswith("c2c-kernels: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_needs_a_gpu(capsys):
    assert main(["tune"]) == 1
    line = capsys.readouterr().err
    assert "tune measures on a GPU, and the triton backend is not available: torch finds no GPU" in line
