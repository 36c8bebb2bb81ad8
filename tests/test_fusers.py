"""C2CFuser: layer maps, caches in place, several sharers, training mode, files."""

from __future__ import annotations

import copy
import json
import warnings
from types import SimpleNamespace

import pytest
import torch

import c2c_kernels as c2c
from c2c_kernels import fuser_file, layer_maps
from c2c_kernels.fuser_layers import FuserShape
from c2c_kernels.fusers import Annealing
from c2c_kernels.projectors import Identity

transformers = pytest.importorskip("transformers")
from transformers import DynamicCache, StaticCache  # noqa: E402

SHAPE = FuserShape(3, 4, 4, 2, 8, 8, hidden=16, inner=24)
MAP = {0: 1, 2: 3}
LAYERS, SHARER_LAYERS = 3, 4


def fuser(
    shape: FuserShape = SHAPE, layer_map=MAP, closed: bool = False, sharer_layers: int = SHARER_LAYERS, **options
) -> c2c.C2CFuser:
    made = c2c.C2CFuser(shape, layer_map, receiver_layers=LAYERS, sharer_layers=sharer_layers, **options)
    with torch.no_grad():
        for layer in made.layer_map:
            for logit in made[layer].gate_logits:
                logit.fill_(-1.0 if closed else 1.0)
    return made.eval()


def pairs(layers: int, heads: int, dim: int, length: int = 6, batch: int = 2, dtype=torch.float32):
    return [tuple(torch.randn(batch, heads, length, dim).to(dtype) for _ in range(2)) for _ in range(layers)]


def own(**options):
    return pairs(LAYERS, 2, 8, **options)


def raw(**options):
    return pairs(SHARER_LAYERS, 3, 4, **options)


def cache_of(layers) -> DynamicCache:
    made = DynamicCache()
    for number, (key, value) in enumerate(layers):
        made.update(key.clone(), value.clone(), number)
    return made


def held(cache) -> list[torch.Tensor]:
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]


class TestLayerMaps:
    def test_last_aligned_is_clamped_at_0(self):
        assert layer_maps.last_aligned(3, 5) == {0: 2, 1: 3, 2: 4}
        assert layer_maps.last_aligned(4, 2) == {0: 0, 1: 0, 2: 0, 3: 1}

    def test_k_nearest_takes_the_lower_of_two_as_near(self):
        assert layer_maps.k_nearest(3, 5) == {0: 0, 1: 2, 2: 4}
        assert layer_maps.k_nearest(3, 2) == {0: 0, 1: 0, 2: 1}
        assert layer_maps.k_nearest(1, 4) == {0: 0} and layer_maps.k_nearest(3, 1) == {0: 0, 1: 0, 2: 0}

    def test_explicit(self):
        assert layer_maps.resolve([None, 3, 0], 3, 4) == {1: 3, 2: 0}
        assert layer_maps.resolve({2: 1}, 3, 4) == {2: 1}
        with pytest.raises(ValueError, match="maps receiver layer 1 to sharer layer 4: the sharer has layers 0..3"):
            layer_maps.resolve([0, 4], 3, 4)
        with pytest.raises(ValueError, match="receiver layer 3 to sharer layer 0: the receiver has layers 0..2"):
            layer_maps.resolve({3: 0}, 3, 4)
        with pytest.raises(ValueError, match=r"layer_map must be one of last_aligned, k_nearest.* got 'first'"):
            layer_maps.resolve("first", 3, 4)

    def test_for_models(self):
        receiver = SimpleNamespace(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        sharer = SimpleNamespace(num_hidden_layers=5, num_attention_heads=3, hidden_size=12)
        made = c2c.C2CFuser.for_models(receiver, sharer, hidden=16, inner=24)
        assert made.layer_map == {0: 2, 1: 3, 2: 4} and made.shape == SHAPE
        made.check_models(receiver, sharer)
        with pytest.raises(ValueError, match="the receiver has 3 KV heads x 4, the fuser is made for 2 x 8"):
            made.check_models(sharer, receiver)


class TestFuseCache:
    def test_rewrites_a_range_of_a_dynamic_cache_in_place(self):
        made, receiver, sharer = fuser(), own(), raw()
        cache = cache_of(receiver)
        places = [layer.keys.data_ptr() for layer in cache.layers]
        made.fuse_cache(cache, cache_of(sharer), 1, 4)
        assert places == [layer.keys.data_ptr() for layer in cache.layers]
        with torch.no_grad():
            wanted = made(
                [tuple(t[:, :, 1:4] for t in pair) for pair in receiver],
                [tuple(t[:, :, 1:4] for t in pair) for pair in sharer],
            )
        for number, layer in enumerate(cache.layers):
            for got, old, new in zip((layer.keys, layer.values), receiver[number], wanted[number], strict=True):
                torch.testing.assert_close(got[:, :, 1:4], new)
                assert torch.equal(got[:, :, 4:], old[:, :, 4:]) and torch.equal(got[:, :, :1], old[:, :, :1])
                assert torch.equal(got, old) == (number not in MAP)

    def test_static_caches(self):
        config = transformers.LlamaConfig(
            num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, hidden_size=32
        )
        made, receiver, sharer = fuser(), own(), raw()
        static = StaticCache(config=config, max_cache_len=9)
        for number, (key, value) in enumerate(receiver):
            static.update(key, value, number, {"cache_position": torch.arange(6)})
        dynamic = cache_of(receiver)
        made.fuse_cache(dynamic, sharer)
        made.fuse_cache(static, sharer)
        for mine, other in zip(static.layers, dynamic.layers, strict=True):
            assert torch.equal(mine.keys[:, :, :6], other.keys) and not mine.keys[:, :, 6:].any()

    def test_index(self):
        made, receiver, sharer = fuser(), own(), raw(length=9)
        index = torch.randint(9, (2, 3))
        cache = cache_of(receiver)
        made.fuse_cache(cache, sharer, 2, 5, index=index)
        gathered = [tuple(t.gather(2, index[:, None, :, None].expand(-1, 3, -1, 4)) for t in pair) for pair in sharer]
        with torch.no_grad():
            wanted = made([tuple(t[:, :, 2:5] for t in pair) for pair in receiver], gathered)
        torch.testing.assert_close(cache.layers[2].values[:, :, 2:5], wanted[2][1])

    @pytest.mark.parametrize("mode", ["parallel", "sequential"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_several_sharers(self, mode, dtype):
        fusers = [fuser(), fuser(layer_map={0: 0, 1: 1}), fuser(layer_map={0: 3})]
        receiver, sharers = own(dtype=dtype), [raw(dtype=dtype) for _ in fusers]
        cache = cache_of(receiver)
        c2c.fuse_caches(cache, list(zip(fusers, sharers, strict=True)), mode=mode)
        clean = [[t.double() for t in pair] for pair in receiver]
        total = [list(pair) for pair in clean]
        for made, sharer in zip(fusers, sharers, strict=True):
            read = clean if mode == "parallel" else [list(pair) for pair in total]
            if mode == "sequential" and dtype == torch.bfloat16:
                read = total = [[t.to(dtype).double() for t in pair] for pair in total]
            with torch.no_grad():
                fused = copy.deepcopy(made).double()(read, [[t.double() for t in pair] for pair in sharer])
            total = [
                [t + (f - r) for t, f, r in zip(*three, strict=True)] for three in zip(total, fused, read, strict=True)
            ]
        for layer, wanted in zip(cache.layers, total, strict=True):
            for got, exact in zip((layer.keys, layer.values), wanted, strict=True):
                assert got.dtype == dtype
                # One rounding: half an ulp of the largest, and float32's own error.
                bound = (0.51 if mode == "parallel" else 1.5) * torch.finfo(dtype).eps * exact.abs().max() + 1e-6
                assert (got.double() - exact).abs().max() <= bound

    def test_layers_are_summed_in_groups(self, monkeypatch):
        monkeypatch.setattr("c2c_kernels.fusers._SUM_BYTES", 1)
        fusers, receiver, sharers = [fuser(), fuser()], own(), [raw(), raw()]
        one_by_one, together = cache_of(receiver), cache_of(receiver)
        c2c.fuse_caches(one_by_one, list(zip(fusers, sharers, strict=True)))
        monkeypatch.undo()
        c2c.fuse_caches(together, list(zip(fusers, sharers, strict=True)))
        assert all(torch.equal(a, b) for a, b in zip(held(one_by_one), held(together), strict=True))

    def test_closed_gates_warn_once_and_change_no_bit(self):
        made, receiver = fuser(closed=True), own()
        cache = cache_of(receiver)
        with pytest.warns(UserWarning, match=r"every gate of the fuser is closed \(4 of 4\)"):
            made.fuse_cache(cache, raw())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made.fuse_cache(cache, raw())
        assert all(torch.equal(a, b) for a, b in zip(held(cache), [t for p in receiver for t in p], strict=True))
        assert made.gate_report() == [(0, 1, False, False), (2, 3, False, False)]
        made[2].value_gate_logit.data.fill_(0.1)
        assert made.gate_report()[1] == (2, 3, False, True)

    @pytest.mark.parametrize("backend", [r.name for r in c2c.backends() if r.name in ("reference", "cpu")])
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"sharer": raw(batch=3)}, "sharer_cache has batch 3, receiver_cache has 2"),
            ({"sharer": raw(length=5)}, "sharer_cache holds 5 tokens: without an index it must hold the 6"),
            ({"sharer": raw()[:3]}, "maps receiver layer 2 to sharer layer 3: the sharer has layers 0..2"),
            ({"sharer": pairs(4, 3, 5)}, r"sharer_cache layer 1 has key \(2, 3, 6, 5\) .* \(batch, 3, len, 4\)"),
            ({"receiver": own()[:2]}, "the receiver has layers 0..1"),
            ({"receiver": pairs(3, 1, 8)}, r"receiver layer 0 has key \(2, 1, 6, 8\)"),
            ({"stop": 7}, r"tokens 0..7 are not in receiver_cache, which holds 6"),
            ({"start": 3, "stop": 2}, r"tokens 3..2 are not in receiver_cache"),
            ({"receiver": pairs(4, 2, 8)}, "receiver has 4 layers, the fuser is made for 3"),
            ({"sharer": raw() + raw()[:1]}, "sharer_cache has 5 layers, the fuser is made for 4"),
            ({"start": 1.0}, "start must be an integer, got 1.0"),
            ({"start": True}, "start must be an integer, got True"),
            ({"stop": "2"}, "stop must be an integer, got '2'"),
            ({"index": torch.full((2, 6), 6)}, r"^index has values outside 0..5"),
            ({"index": torch.full((2, 6), -1)}, r"^index has values outside 0..5"),
            ({"index": torch.zeros(2, 5).long()}, r"^index has shape \(2, 5\), wanted .* = \(2, 6\)"),
            ({"index": torch.zeros(2, 6)}, "^index has dtype torch.float32, wanted int32 or int64"),
            ({"index": [[0] * 6] * 2}, "^index must be a tensor, got list"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit_is_refused_and_the_cache_untouched(self, change, match, backend):
        cache = cache_of(change.get("receiver", own()))
        before = held(cache)
        with pytest.raises((ValueError, TypeError), match=match):
            fuser().fuse_cache(
                cache, change.get("sharer", raw()), change.get("start", 0), change.get("stop"),
                index=change.get("index"), backend=backend,
            )  # fmt: skip
        with pytest.raises(ValueError, match="mode must be one of"):
            c2c.fuse_caches(cache, [], mode="both")  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(held(cache), before, strict=True))

    def test_the_second_sharer_is_checked_before_the_first_is_written(self):
        cache = cache_of(own())
        before = held(cache)
        good, bad = raw(), raw()
        bad[1] = (bad[1][0].to("meta"), bad[1][1])
        for mode in ("parallel", "sequential"):
            with pytest.raises(ValueError, match="is on meta"):
                c2c.fuse_caches(cache, [(fuser(), good), (fuser(), bad)], mode=mode)  # type: ignore[arg-type]
            outside = torch.full((2, 6), 6)
            with pytest.raises(ValueError, match=r"^indices\[1\] has values outside 0..5"):
                c2c.fuse_caches(cache, [(fuser(), good), (fuser(), raw())], mode=mode, indices=[None, outside])  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(held(cache), before, strict=True))

    @pytest.mark.parametrize("mode", ["parallel", "sequential"])
    def test_layers_that_share_memory_are_refused(self, mode):
        alike = FuserShape(2, 8, 8, 2, 8, 8, hidden=16, inner=24)
        cache = own()
        before = [t.clone() for pair in cache for t in pair]
        with pytest.raises(ValueError, match=r"layer [01] writes to memory that receiver_cache layer [01] reads"):
            fuser(alike, {0: 1, 1: 0}, sharer_layers=LAYERS).fuse_cache(cache, cache)
        for layers in ([cache[0], cache[1], cache[0]], [cache[0], cache[0], cache[2]]):
            with pytest.raises(ValueError, match=r"layer \d writes to memory that receiver_cache layer \d reads"):
                fuser().fuse_cache(layers, raw())
        # The second sharer reads what is written for the first.
        with pytest.raises(ValueError, match=r"layer \d writes to memory that receiver_cache layer \d reads"):
            c2c.fuse_caches(cache, [(fuser(), raw()), (fuser(alike, {2: 0}, sharer_layers=LAYERS), cache)], mode=mode)
        assert all(torch.equal(a, b) for a, b in zip(before, [t for pair in cache for t in pair], strict=True))

    def test_an_empty_cache_is_said_to_be_the_receivers(self):
        with pytest.raises(ValueError, match="receiver_cache has no layers: run its model on the text first"):
            fuser().fuse_cache(DynamicCache(), raw())

    def test_truncated_windows_are_refused(self):
        config = transformers.MistralConfig(
            num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, sliding_window=4
        )
        cache = DynamicCache(config=config)
        for number, (key, value) in enumerate(own()):
            cache.update(key, value, number)
        with pytest.raises(ValueError, match=r"receiver_cache\.layers\[0\] is a sliding window that has dropped"):
            fuser().fuse_cache(cache, raw())


class TestTraining:
    def test_soft_gates_pull_on_the_logits(self):
        made = fuser(dropout=0.0).train()
        out = made(own(), raw())
        assert out[1][0].grad_fn is None  # not mapped: as it came
        sum(t.square().sum() for pair in (out[0], out[2]) for t in pair).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())

    def test_the_gates_become_hard(self):
        made = fuser(annealing=Annealing(1.0, 1e-3, 10), dropout=0.0)
        assert [made.update_temperature(step) for step in (0, 5, 10, 99)] == pytest.approx(
            [1, 0.0316, 1e-3, 1e-3], rel=1e-2
        )
        uniforms = (torch.rand(2, 2, 6), torch.rand(2, 2, 6))
        gates = made[0].gates(uniforms, made.gate_temperature)
        assert all(bool(((gate < 1e-6) | (gate > 1 - 1e-6)).float().mean() > 0.95) for gate in gates)
        soft = made[0].gates(uniforms, 1.0)
        # The gate is open with probability sigmoid(logit) of logistic noise, here of Gumbel's: P(g > -1) = 1 - exp(-e).
        made.requires_grad_(False)
        many = made[0].gates((torch.rand(100_000), torch.rand(100_000)), 1e-3)[0]
        assert float(many.mean()) == pytest.approx(1 - float(torch.exp(-torch.exp(torch.tensor(1.0)))), abs=0.01)
        assert not torch.equal(soft[0], gates[0])

    def test_dropout_is_drawn_in_training_only(self):
        made, receiver, sharer = fuser(dropout=0.5), own(), raw()
        with torch.no_grad():
            assert torch.equal(made(receiver, sharer)[0][0], made(receiver, sharer)[0][0])
            made.train()
            uniforms = (torch.rand(2, 2, 6), torch.rand(2, 2, 6))
            first, second = (made[0](receiver[0], sharer[1], uniforms=uniforms)[0] for _ in range(2))
        assert not torch.equal(first, second)
        for layer in made.layers.values():
            layer.dropout = 0.0
        with torch.no_grad():
            first, second = (made[0](receiver[0], sharer[1], uniforms=uniforms)[0] for _ in range(2))
        assert torch.equal(first, second)

    def test_weights_follow_the_parameters(self):
        made = fuser()
        kept = made[0].weights()
        assert made[0].weights() is kept
        made.bfloat16()
        assert made[0].weights().key.in_weight.dtype == torch.bfloat16
        made.load_state_dict({name: t.float() for name, t in made.state_dict().items()}, assign=True)
        assert made[0].weights() is not kept and made[0].weights().value.gate_logit.dtype == torch.float32
        assert torch.equal(copy.deepcopy(made)[0].weights().key.in_weight, made[0].key_in_weight)


class TestFiles:
    def written(self, path, **options):
        made = fuser(
            sharer=Identity("them", "1" * 64, "2" * 64), receiver=Identity("us", "3" * 64, "4" * 64),
            facts={"steps": 7}, dropout=0.2, **options,
        )  # fmt: skip
        made.gate_temperature = 0.25
        made.save(path)
        return made

    def test_round_trip(self, tmp_path):
        path = tmp_path / "fuser.safetensors"
        for dtype in (torch.float32, torch.bfloat16):
            made = self.written(path).to(dtype)
            made.save(path)
            got = c2c.C2CFuser.load(path)
            assert not got.training and all(p.requires_grad for p in got.parameters())
            for name, tensor in made.state_dict().items():
                assert torch.equal(tensor, got.state_dict()[name]) and got.state_dict()[name].dtype == dtype
            for name in ("shape", "layer_map", "receiver_layers", "sharer_layers", "dropout", "annealing", "sharer",
                         "receiver", "facts", "gate_temperature"):  # fmt: skip
                assert getattr(made, name) == getattr(got, name), name
        made.save(path, storage=torch.float16)
        assert next(c2c.C2CFuser.load(path).parameters()).dtype == torch.float16
        assert sorted(p.name for p in tmp_path.iterdir()) == ["fuser.safetensors"]

    def test_header_names_models_shapes_map_and_version(self, tmp_path):
        from safetensors import safe_open

        self.written(tmp_path / "f.safetensors")
        with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
            header = json.loads(file.metadata()["c2c"])
        assert (header["format"], header["version"]) == ("c2c-kernels fuser", 1)
        assert header["sharer"]["name"] == "them" and header["receiver"]["name"] == "us"
        assert header["layer_map"] == [[0, 1], [2, 3]] and header["shape"]["hidden"] == 16

    def rewritten(self, path, change_tensors=lambda t: t, change_header=lambda h: h):
        from safetensors import safe_open
        from safetensors.torch import save_file

        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = json.loads(file.metadata()["c2c"])
        save_file(change_tensors(tensors), path, metadata={"c2c": json.dumps(change_header(header))})

    @pytest.mark.parametrize(
        ("tensors", "header", "match"),
        [
            (lambda t: {k: v for k, v in t.items() if k != "layers.0.key_in_bias"}, None,
             r"f\.safetensors has no tensor layers\.0\.key_in_bias: wanted one of shape \(16,\)"),
            (lambda t: {**t, "layers.1.more": torch.zeros(2)}, None, r"extra tensor layers\.1\.more of shape \(2,\)"),
            (lambda t: {**t, "layers.2.value_out_bias": torch.zeros(3)}, None,
             r"layers\.2\.value_out_bias has shape \(3,\), wanted \(16,\)"),
            (lambda t: {**t, "layers.2.value_out_bias": torch.full((16,), torch.nan)}, None, "infinite or NaN values"),
            (lambda t: {**t, "layers.2.value_out_bias": torch.zeros(16).half()}, None, "mixes dtypes"),
            (lambda t: {k: v.int() for k, v in t.items()}, None, "is torch.int32, wanted float32, bfloat16 or float16"),
            (None, lambda h: {**h, "version": 2}, "is 'c2c-kernels fuser' version 2, wanted .* version 1"),
            (None, lambda h: {**h, "format": "c2c-kernels cache projector"}, "is 'c2c-kernels cache projector'"),
            (None, lambda h: {**h, "layer_map": [[0, 9]]}, "sharer layer 9: the sharer has layers 0..3"),
            (None, lambda h: {**h, "shape": {**h["shape"], "num_layers": 2}}, "num_layers must be an integer"),
            (None, lambda h: {k: v for k, v in h.items() if k != "dropout"}, "damaged header: 'dropout'"),
            (None, lambda h: {**h, "shape": {**h["shape"], "hidden": 2**45}},
             r"layers\.0\.key_\w+ has shape \(16,\), wanted \(35184372088832,\)"),
            (None, lambda h: {**h, "shape": {**h["shape"], "num_layers": 200_000}},
             "no tensor layers.0.key_project_1_norm"),
            (None, lambda h: {**h, "annealing": {**h["annealing"], "steps": 0}},
             "steps of annealing must be an integer"),
            (None, lambda h: {**h, "annealing": {**h["annealing"], "initial": "x"}},
             "initial temperature must be a number"),
            (None, lambda h: {**h, "gate_temperature": 0}, "gate_temperature must be a number above 0, got 0"),
            (None, lambda h: {**h, "gate_temperature": "0.5"}, "gate_temperature must be a number above 0, got '0.5'"),
            (None, lambda h: {**h, "receiver_layers": 2.5}, "receiver_layers must be an integer of at least 1 or None"),
            (None, lambda h: {**h, "version": True}, "version True, wanted .* version 1"),
            (None, lambda h: {**h, "layer_map": [[0, 1], [2, 3], [2, 1]]}, "layer_map has a receiver layer twice"),
            (None, lambda h: {**h, "sharer": {**h["sharer"], "name": 7}}, "name of a model must be text, got 7"),
            (None, lambda h: {**h, "dropout": "x"}, "dropout must be at least 0 and below 1, got 'x'"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit_is_refused(self, tmp_path, tensors, header, match):
        path = tmp_path / "f.safetensors"
        self.written(path)
        same = lambda x: x  # noqa: E731
        self.rewritten(path, tensors or same, header or same)
        with pytest.raises(fuser_file.FuserFileError, match=match):
            c2c.C2CFuser.load(path)

    def test_a_header_nested_too_deeply_is_refused(self, tmp_path):
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(1)}, tmp_path / "f.safetensors", metadata={"c2c": "[" * 100_000})
        with pytest.raises(fuser_file.FuserFileError, match="without the header of a fuser"):
            c2c.C2CFuser.load(tmp_path / "f.safetensors")

    def test_what_could_not_be_loaded_is_not_written(self, tmp_path):
        path = tmp_path / "f.safetensors"
        made = fuser()
        with torch.no_grad():
            made[0].key_in_weight[0, 0] = 1e6
        with pytest.raises(ValueError, match=r"as torch\.float16: layers\.0\.key_in_weight has infinite or NaN values"):
            made.save(path, storage=torch.float16)
        with pytest.raises(ValueError, match="key_in_weight is torch.float64, wanted float32"):
            copy.deepcopy(made).double().save(path)
        made[2].half()
        with pytest.raises(ValueError, match="mixes dtypes"):
            made.save(path)
        made[2].float()
        made.gate_temperature = 0.0
        with pytest.raises(ValueError, match="gate_temperature must be a number above 0"):
            made.save(path)
        made.gate_temperature = 1.0
        with pytest.raises(FileNotFoundError, match=r"f\.safetensors cannot be written: there is no folder .*none"):
            made.save(tmp_path / "none" / "f.safetensors")
        assert not list(tmp_path.iterdir())

    def test_others_may_read_what_they_may_read_of_any_new_file(self, tmp_path):
        (tmp_path / "any").touch()
        self.written(tmp_path / "f.safetensors")
        assert (tmp_path / "f.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode

    def test_loading_draws_no_random_numbers(self, tmp_path):
        self.written(tmp_path / "f.safetensors")
        state = torch.get_rng_state()
        c2c.C2CFuser.load(tmp_path / "f.safetensors")
        assert torch.equal(state, torch.get_rng_state())

    def test_truncated_missing_and_other_files(self, tmp_path):
        path = tmp_path / "f.safetensors"
        with pytest.raises(FileNotFoundError, match=r"f\.safetensors does not exist: a fuser file is wanted"):
            c2c.C2CFuser.load(path)
        self.written(path)
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(fuser_file.FuserFileError, match=r"f\.safetensors is truncated, damaged or no safetensors"):
            c2c.C2CFuser.load(path)
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(1)}, path)
        with pytest.raises(fuser_file.FuserFileError, match="without the header of a fuser"):
            c2c.C2CFuser.load(path)

    def test_closed_gates_warn(self, tmp_path):
        fuser(closed=True).save(tmp_path / "f.safetensors")
        with pytest.warns(UserWarning, match=r"every gate of the fuser of .*f\.safetensors is closed"):
            c2c.C2CFuser.load(tmp_path / "f.safetensors")
