"""What each architecture reads of a file, what it applies, and what it refuses; against recorded logits of llama.cpp too."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ggmq.archs import ARCHS, open_arch
from ggmq.archs.keys import EVERY, READ
from ggmq.archs.stage import Batch, Placed, Stage
from ggmq.cluster import Client
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from protocol.errors import FormatError
from protocol.graph import Graph
from protocol.ops import op_of
from tests.support.fixtures import ROOT, nmse
from tests.support.loaded import cpu_workers, loaded
from tests.support.random_models import (
    KEYS,
    NORMED_QK,
    Model,
    add_bias,
    base,
    fingerprint,
    folded,
    fuse,
    numbered,
    scale,
    write,
)

RECORDED = np.load(ROOT / "tests" / "data" / "models.npz")


def made(arch: str, seed: int = 1, experts: bool | None = False) -> Model:
    return base(arch, random.Random(f"{arch} {seed}"), experts)


def graph(folder: Path, m: Model, n_ctx: int = 256) -> Graph:
    """The graph of all layers for two tokens; weights lie where they come in the file."""
    arch = open_arch(GGUF(write(folder / "m.gguf", m)))
    placed, at = {}, 0
    for t in arch.gguf:
        placed[t.name] = Placed(t, 1, at)
        at += t.n_bytes
    layers = range(arch.hp.n_layer)
    room = arch.room(256)
    batch = Batch(2, n_pages=4, n_logits=2, in_order=True, windows=room.windows, has_states=room.has_states, n_ctx=n_ctx)
    return arch.build(Stage(0, layers, True, True), placed, arch.layer_memory(layers, room, 2), batch)[0]


def refusal(folder: Path, m: Model) -> str:
    with pytest.raises(FormatError) as e:
        open_arch(GGUF(write(folder / "m.gguf", m)))
    return str(e.value)


@pytest.fixture(scope="module")
def one() -> Iterator[Client]:
    with cpu_workers(1) as client:
        yield client


def logits(client: Client, folder: Path, m: Model, n_ctx: int = 256, tokens: int = 20, n_seq: int = 1) -> np.ndarray:
    ids = np.random.default_rng(3).integers(0, m.n_vocab, tokens).astype(np.int32)
    model = loaded(client, write(folder / "m.gguf", m), n_ctx, n_seq=n_seq)
    try:
        return model.forward(ids, 0, range(tokens))
    finally:
        client.drain()


# -- against llama.cpp -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(len(RECORDED["number"])))
def test_random_models_are_as_llama_cpp_has_them(one: Client, tmp_path: Path, i: int) -> None:
    m, _ = numbered(int(RECORDED["seed"]), int(RECORDED["number"][i]))
    if fingerprint(m) != RECORDED["fingerprint"][i].tobytes():
        pytest.skip("this NumPy makes other random models than the recorded ones")
    expected = RECORDED["logits"][i]
    path, n_ctx = write(tmp_path / "m.gguf", m), int(RECORDED["n_ctx"][i])
    if np.isnan(expected[0]):
        with pytest.raises(FormatError):
            open_arch(GGUF(path))
        return
    model = loaded(one, path, n_ctx)
    try:
        got = Engine(model).logits(RECORDED["tokens"][i])[-1]
    finally:
        one.drain()
    assert nmse(got, expected[: m.n_vocab]) < 1e-4, m.done


def test_every_architecture_is_recorded() -> None:
    assert {numbered(int(RECORDED["seed"]), int(n))[0].arch for n in RECORDED["number"]} == set(ARCHS) == set(READ)


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_keys_of_others_are_not_applied(tmp_path: Path, arch: str) -> None:
    plain, rng = made(arch), random.Random(1)
    for name, choice in KEYS.items():
        if name not in READ[arch]:
            assert graph(tmp_path, plain.having(**{name: choice(rng)})) == graph(tmp_path, plain), name


@pytest.mark.parametrize("arch", ARCHS)
def test_a_model_needs_the_epsilon_of_its_norms(tmp_path: Path, arch: str) -> None:
    key = "attention.layer_norm_epsilon" if arch == "gpt2" else "attention.layer_norm_rms_epsilon"
    assert f"key {arch}.{key} is missing" in refusal(tmp_path, made(arch).without(key))


def test_gemma2_has_caps_and_a_window_though_its_file_says_nothing(tmp_path: Path) -> None:
    m = made("gemma2")
    explicit = {"attention.sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    assert graph(tmp_path, m) == graph(tmp_path, m.having(**explicit))
    for key, other in (("attention.sliding_window", 5), ("attn_logit_softcapping", 3.0), ("final_logit_softcapping", 3.0)):
        assert graph(tmp_path, m) != graph(tmp_path, m.having(**{key: other})), key
    assert graph(tmp_path, made("gemma3")) == graph(tmp_path, made("gemma3").having(final_logit_softcapping=0.0))


def ropes(folder: Path, m: Model, n_ctx: int = 256) -> list[dict[str, object]]:
    """The parameters of queries' rotations, a layer each, with the offset of their factors."""
    g = graph(folder, m, n_ctx)
    out = []
    for t in g.tensors:
        if t.op == "ROPE":
            factors = g.tensors[t.src[2]].offset if len(t.src) > 2 else None
            out.append({**op_of(t).values(t.params), "factors": factors})
    return out[::2]


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}


def test_an_original_context_of_nothing_is_the_trained_one(tmp_path: Path) -> None:
    m = made("llama").having(**YARN)
    (first, *_) = ropes(tmp_path, m.having(rope__scaling__original_context_length=0))
    assert first["n_ctx_orig"] == 512 and first["ext_factor"] == 1
    assert ropes(tmp_path, m)[0] == first
    assert "original_context_length" in refusal(tmp_path, made("mistral3").having(
        rope__scaling__original_context_length=0, attention__temperature_scale=0.5))  # fmt: skip


def test_windowed_layers_are_turned_as_their_architecture_says(tmp_path: Path) -> None:
    keys = {**YARN, "rope.scaling.attn_factor": 1.25, "attention.sliding_window": 8, "rope.freq_base_swa": 77.0,
            "attention.sliding_window_pattern": 2}  # fmt: skip
    for arch, base_swa, scale_swa, ext in (("gemma3", 77.0, 1.0, 1.0), ("gemma2", 77.0, 0.25, 1.0),
                                           ("gpt-oss", 77.0, 0.25, 1.0), ("olmo2", 10000.0, 1.0, 0.0)):  # fmt: skip
        m = next(m for i in range(99) if (m := made(arch, i)).keys["block_count"] > 1)
        windowed, whole, *_ = ropes(tmp_path, m.having(**keys))
        assert (windowed["freq_base"], windowed["freq_scale"], windowed["ext_factor"]) == (base_swa, scale_swa, ext), arch
        assert (whole["freq_base"], whole["freq_scale"], whole["ext_factor"]) == (10000.0, 0.25, 1.0), arch
        assert windowed["attn_factor"] == (1.0 if arch == "olmo2" else whole["attn_factor"]), arch
        none = ropes(tmp_path, m.having(**keys, rope__scaling__type="none"))
        assert none[1]["freq_scale"] == 1.0 and none[0]["freq_scale"] == scale_swa, arch


def test_gemma3_without_a_base_for_windows_takes_10000(tmp_path: Path) -> None:
    m = made("gemma3").having(attention__sliding_window=8, rope__freq_base=1e6)
    assert ropes(tmp_path, m)[0]["freq_base"] == 10000.0


@pytest.mark.parametrize(("key", "value", "words"), [
    ("rope.scaling.type", "ntk", "one of none, linear, yarn, longrope, got 'ntk'"),
    ("rope.scaling.factor", -1.0, "a finite number of at least 0"), ("rope.scaling.factor", float("nan"), "a finite number"),
    ("attention.causal", False, "true"), ("nextn_predict_layers", 1, "0 to 0, got 1"), ("expert_group_count", 2, "0 to 1"),
    ("attention.layer_norm_rms_epsilon", -1.0, "at least 0"), ("feed_forward_length", 0, "feed-forward"),
    ("attention.value_length", 7, "the width of keys"), ("attention.head_count_kv", [1], "one value a layer"),
    ("feed_forward_length", 33, r"blk\.0\.ffn_up\.weight: expected shape \[\d+, 33\] by the metadata"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_by_name(tmp_path: Path, key: str, value: object, words: str) -> None:
    m = next(m for i in range(99) if (m := made("llama", i)).keys["block_count"] > 1).having(**{key: value})
    with pytest.raises(FormatError, match=words) as e:
        open_arch(GGUF(write(tmp_path / "m.gguf", m)))
    assert key in str(e.value) or "ffn_up" in str(e.value)


def test_granite_needs_what_its_logits_are_divided_by(tmp_path: Path) -> None:
    assert "granite.logit_scale is missing" in refusal(tmp_path, made("granite").without("logit_scale"))
    assert "logit_scale" in refusal(tmp_path, made("granite").having(logit_scale=0.0))


def test_the_table_has_no_key_twice_and_all_that_every_model_has() -> None:
    for arch, keys in READ.items():
        assert keys.keys() >= EVERY.keys(), arch


# -- tensors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_a_tensor_that_no_graph_uses_is_named(tmp_path: Path, arch: str) -> None:
    m = made(arch)
    m.tensors["blk.0.attn_gate.weight"] = np.ones((2, 32), np.float32)
    assert f"tensor blk.0.attn_gate.weight: architecture {arch} does not use such a tensor" in refusal(tmp_path, m)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_tensor_of_another_shape_and_one_that_is_missing_are_named(tmp_path: Path, arch: str) -> None:
    plain = made(arch, 2)
    rng = random.Random(arch)
    for name in rng.sample(sorted(plain.tensors), 5):
        if name == "token_embd.weight":
            continue
        m = plain.copy()
        del m.tensors[name]
        assert f"tensor {name} is missing" in refusal(tmp_path, m)
        m.tensors[name] = plain.tensors[name].repeat(2, axis=0)
        assert f"tensor {name}: expected shape" in refusal(tmp_path, m)


def test_a_weight_of_a_type_that_its_op_does_not_take_is_named(tmp_path: Path) -> None:
    import gguf

    m = made("llama")
    m.types["blk.0.attn_norm.weight"] = gguf.GGMLQuantizationType.Q8_0
    assert "blk.0.attn_norm.weight: tensor " in refusal(tmp_path, m)


@pytest.mark.parametrize(("arch", "name"), [("qwen3", "cls.output.weight"), ("gemma3", "dense_2.weight"),
                                            ("llama", "blk.0.attn_q.input_scale")])  # fmt: skip
def test_tensors_of_a_known_list_may_lie_idle(tmp_path: Path, arch: str, name: str) -> None:
    m = made(arch)
    m.tensors[name] = np.ones(1, np.float32)
    assert name not in open_arch(GGUF(write(tmp_path / "m.gguf", m))).used
    other = made("llama" if arch != "llama" else "gpt2")
    other.tensors[name] = np.ones(1, np.float32)
    assert f"tensor {name}" in refusal(tmp_path, other)


NUMBERS = np.random.default_rng(8)
SCALED = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_exps", "ffn_up_exps",
          "ffn_down_exps", "attn_qkv", "ssm_in", "ssm_out")  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_scales_beside_weights_are_as_weights_that_were_multiplied(
    one: Client, tmp_path: Path, arch: str, experts: bool
) -> None:
    m = made(arch, 3, experts)
    for name in [t.removesuffix(".weight") for t in m.tensors]:
        if name.rsplit(".", 1)[-1] in SCALED and name + ".weight" in m.tensors:
            scale(m, name, NUMBERS)
    assert nmse(logits(one, tmp_path, m), logits(one, tmp_path, folded(m))) < 1e-6


@pytest.mark.parametrize("name", ["token_embd", "output", "blk.0.ffn_gate_inp", "blk.0.attn_norm"])
def test_scales_where_none_can_be_are_refused(tmp_path: Path, name: str) -> None:
    m = made("llama", 1, experts=True)
    m.tensors["output.weight"] = m.tensors["token_embd.weight"]
    m.tensors[name + ".scale"] = np.ones(1, np.float32)
    assert f"tensor {name}.scale" in refusal(tmp_path, m)


@pytest.mark.parametrize("arch", [a for a in ARCHS if a not in ("gpt2", "mamba2")])
@pytest.mark.parametrize("biases", ["separate", "fused", "none"])
def test_fused_weights_are_as_separate_ones(one: Client, tmp_path: Path, arch: str, biases: str) -> None:
    m = made(arch, 4)
    if biases != "none":
        for i in range(m.keys["block_count"]):
            for x in "qkv":
                add_bias(m, f"blk.{i}.attn_{x}", NUMBERS)
    assert nmse(logits(one, tmp_path, fuse(m, biases)), logits(one, tmp_path, m)) < 1e-8


def test_shared_experts_of_granite_are_added(one: Client, tmp_path: Path) -> None:
    """With all experts alike, and weighted to one in all, a shared one that is like them doubles what they make."""
    m = made("granite", 5, experts=True).having(rope__scaling__finetuned=True)
    n_layer, n_ff = m.keys["block_count"], m.keys["feed_forward_length"]
    for i in range(n_layer):
        for x in ("gate", "up", "down"):
            name = f"blk.{i}.ffn_{x}_exps.weight"
            m.tensors[name] = np.broadcast_to(m.tensors[name][:1], m.tensors[name].shape).copy()
    both, doubled = m.having(expert_shared_feed_forward_length=n_ff), m.copy()
    for i in range(n_layer):
        for x in ("gate", "up", "down"):
            both.tensors[f"blk.{i}.ffn_{x}_shexp.weight"] = m.tensors[f"blk.{i}.ffn_{x}_exps.weight"][0]
        doubled.tensors[f"blk.{i}.ffn_down_exps.weight"] *= 2
    assert nmse(logits(one, tmp_path, both), logits(one, tmp_path, doubled)) < 1e-8
    assert nmse(logits(one, tmp_path, both), logits(one, tmp_path, m)) > 1e-4
    assert "ffn_gate_shexp" in refusal(tmp_path, both.without("expert_shared_feed_forward_length"))


@pytest.mark.parametrize("arch", ["llama", "mistral3", "granite", "phi3"])
def test_long_and_short_factors_by_the_context(tmp_path: Path, arch: str) -> None:
    m = made(arch).having(rope__scaling__type="longrope", rope__scaling__original_context_length=256)
    m.keys["rope.scaling.finetuned"] = True
    n = m.tensors["blk.0.attn_q.weight"].shape[0] // m.keys["attention.head_count"] // 2
    for name in ("short", "long"):
        m.tensors[f"rope_factors_{name}.weight"] = np.full(n, 2.0, np.float32)
    short, long = ropes(tmp_path, m, 256)[0], ropes(tmp_path, m, 257)[0]
    assert short["factors"] is not None and long["factors"] is not None and short["factors"] < long["factors"]
    if arch != "phi3":
        other = m.having(rope__scaling__type="linear")
        assert "rope_factors_" in refusal(tmp_path, other)
        other.tensors["rope_freqs.weight"] = other.tensors.pop("rope_factors_short.weight")
        del other.tensors["rope_factors_long.weight"]
        assert ropes(tmp_path, other)[0]["factors"] is not None


def test_factors_go_by_a_sequence_s_context_whatever_the_number_of_sequences(one: Client, tmp_path: Path) -> None:
    m = made("phi3").having(rope__scaling__original_context_length=256)
    n = m.keys["embedding_length"] // m.keys["attention.head_count"] // 2
    m.tensors["rope_factors_short.weight"] = np.full(n, 1.0, np.float32)
    m.tensors["rope_factors_long.weight"] = np.full(n, 9.0, np.float32)
    alone, among = logits(one, tmp_path, m), logits(one, tmp_path, m, n_seq=5)
    assert np.array_equal(alone, among)
    assert nmse(alone, logits(one, tmp_path, m, n_ctx=512)) > 1e-4


def test_experts_are_there_by_the_metadata(tmp_path: Path) -> None:
    m = made("llama", 1, experts=True)
    assert "blk.0.ffn_up.weight is missing" in refusal(tmp_path, m.without("expert_count", "expert_used_count"))
    assert "expert_used_count: expected 1 to" in refusal(tmp_path, m.without("expert_used_count"))
    assert "expert_count" in refusal(tmp_path, made("qwen3moe").without("expert_count", "expert_used_count"))
    gone = made("qwen3moe")
    del gone.tensors["blk.0.ffn_gate_exps.weight"]
    assert "blk.0.ffn_gate_exps.weight is missing" in refusal(tmp_path, gone)


def test_a_model_that_is_refused_is_refused_whole_before_anything_is_sent(tmp_path: Path) -> None:
    m = made("qwen3")
    assert m.arch in NORMED_QK
    last = m.keys["block_count"] - 1
    del m.tensors[f"blk.{last}.attn_q_norm.weight"]
    assert f"blk.{last}.attn_q_norm.weight is missing" in refusal(tmp_path, m)

