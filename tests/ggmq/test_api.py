"""The Python API over real processes: what `ggmq run` writes, streams, cancelling, many at once, and that nothing stays."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ggmq
from ggmq.api import options
from ggmq.bus import BusConfig
from ggmq.model import ModelConfig, load
from tests.support.fixtures import BUNDLED, ROOT, free_port
from tests.support.processes import GGMQ, WORKER, await_devices, children_of, started, until

PROMPT = "Once upon a time"
TOOL = {"type": "function", "function": {"name": "look", "description": "Look somewhere.", "parameters": {
    "type": "object", "properties": {"place": {"enum": ["park", "zoo"]}}, "required": ["place"]}}}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Iterator[ggmq.Model]:
    with ggmq.load(workers=2, threads=2, parallel=3) as model:
        yield model


def idle(model: ggmq.Model) -> bool:
    state = model._service.state()
    return not state.n_waiting and all(slot.state == "idle" for slot in state.slots)


# -- texts -----------------------------------------------------------------------------------------------------------------


def test_it_writes_what_the_command_line_does(model: ggmq.Model) -> None:
    for more, said in ({"temperature": 0}, ["--temp", "0"]), ({"seed": 7, "top_k": 5}, ["-s", "7", "--top-k", "5"]):
        command = [*GGMQ, "run", "-p", PROMPT, "-n", "40", *said, "--no-display-prompt", "--workers", "1", "-t", "1"]
        r = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        made = model.generate(PROMPT, max_tokens=40, **more)  # type: ignore[call-overload]
        assert r.returncode == 0 and str(made) + "\n" == r.stdout, r.stderr
        assert made.finish_reason == "length" and made.usage.n_made == 40 == len(made.tokens) and made.logprobs is None
        assert model.detokenize(made.tokens) == made.text


def test_a_stream_gives_the_same_in_pieces(model: ggmq.Model) -> None:
    whole = model.generate(PROMPT, temperature=0, stop=" sunny")
    with model.generate(PROMPT, temperature=0, stop=" sunny", stream=True) as stream:
        pieces = list(stream)
        assert "".join(pieces) == whole.text == stream.result.text and len(pieces) > 5
    assert whole.finish_reason == "stop" == stream.result.finish_reason and "sunny" not in whole.text
    assert model.generate(model.tokenize(PROMPT), temperature=0, stop=" sunny").text == whole.text
    assert model.generate(np.array(model.tokenize(PROMPT)), temperature=0, stop=[" sunny"]).text == whole.text


def test_what_is_closed_is_cancelled(model: ggmq.Model) -> None:
    stream = model.generate(PROMPT, ignore_eos=True, stream=True)
    first = next(stream)
    stream.close()
    assert list(stream) == [] and stream.result.finish_reason == "cancelled" and stream.result.text.startswith(first)
    until(lambda: idle(model))
    n_left = model._service.state().n_left
    with model.generate(PROMPT, ignore_eos=True, stream=True) as stream:
        next(stream)
    for _ in model.generate(PROMPT, ignore_eos=True, stream=True):
        break  # nobody holds the stream any more
    assert model._service.state().n_left == n_left + 2
    until(lambda: idle(model))


def test_another_thread_may_close_what_one_waits_for(model: ggmq.Model) -> None:
    busy = [model.generate(PROMPT, ignore_eos=True, stream=True) for _ in range(3)]
    waits = model.generate(PROMPT, ignore_eos=True, stream=True)
    got: list[str] = []
    thread = threading.Thread(target=lambda: got.extend(waits))
    thread.start()
    waits.close()
    thread.join(10)
    assert not thread.is_alive()
    for stream in busy:
        stream.close()
    until(lambda: idle(model))


def test_log_probabilities_biases_and_bans(model: ggmq.Model) -> None:
    made = model.generate(PROMPT, temperature=0, max_tokens=3, logprobs=2)
    assert made.logprobs is not None and [t.id for t in made.logprobs] == made.tokens
    rows = model.logits(model.tokenize(PROMPT))[-1].astype(np.float64)
    expected = rows - rows.max() - np.log(np.exp(rows - rows.max()).sum())
    first = made.logprobs[0]
    assert first.logprob == pytest.approx(expected.max(), abs=1e-4) and len(first.top) == 2
    banned = model.generate(PROMPT, temperature=0, max_tokens=1, logit_bias={first.id: False})
    assert banned.tokens == [first.top[1][0]]
    wanted = model.generate(PROMPT, temperature=0, max_tokens=1, logit_bias={model.tokenize(" dog")[-1]: 100.0})
    assert wanted.text == " dog"


def test_answers_have_the_form_that_is_asked_for(model: ggmq.Model) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 9, "minimum": 1}}, "required": ["age"],
              "additionalProperties": False}  # fmt: skip
    assert 1 <= json.loads(model.generate("How old?", json_schema=schema, seed=1).text)["age"] <= 9
    assert model.generate(PROMPT, regex="[0-9]{3}", seed=1).text.isdigit()
    assert model.generate(PROMPT, choices=["a.b", "c"], seed=1).text in ("a.b", "c")
    assert model.generate(PROMPT, grammar='root ::= "yes" | "no"', seed=1).text in ("yes", "no")
    assert json.loads(model.chat("How old?", json_schema=schema, seed=1).text)


# -- conversations ---------------------------------------------------------------------------------------------------------


def test_a_chat_goes_on(model: ggmq.Model) -> None:
    talk: list[dict[str, object]] = [{"role": "system", "content": "Tell stories."}, {"role": "user", "content": "Hello"}]
    first = model.chat(talk, temperature=0, max_tokens=12)
    assert first.message == {"role": "assistant", "content": first.text} and not first.tool_calls and not first.reasoning
    assert model.chat("Hello", temperature=0, max_tokens=12).text == \
        model.chat([talk[1]], temperature=0, max_tokens=12).text  # fmt: skip
    with model.chat([*talk, first.message, {"role": "user", "content": "And?"}], max_tokens=8, stream=True) as stream:
        assert "".join(stream) == stream.result.text


def test_tools_are_called(model: ggmq.Model) -> None:
    asked = {"tools": [TOOL], "tool_choice": "required", "seed": 1, "parallel_tool_calls": False}
    made = model.chat("Where is Lily?", **asked)  # type: ignore[call-overload]
    (call,) = made.tool_calls
    assert made.finish_reason == "tool_calls" and call.name == "look" and call.parsed["place"] in ("park", "zoo")
    stream = model.chat("Where is Lily?", stream=True, **asked)  # type: ignore[call-overload]
    pieces = list(stream.pieces())
    assert all(isinstance(p, ggmq.ToolCallPiece) for p in pieces)
    assert "".join(p.arguments for p in pieces) == call.arguments
    answered = [{"role": "user", "content": "Where is Lily?"}, made.message,
                {"role": "tool", "tool_call_id": call.id, "content": "not there"}]  # fmt: skip
    assert model.chat(answered, tools=[TOOL], tool_choice="none", max_tokens=5).text


# -- an event loop ---------------------------------------------------------------------------------------------------------


def test_many_at_once_on_one_loop_each_as_if_alone(model: ggmq.Model) -> None:
    prompts = [f"One day {name} saw {n} birds" for n in range(20) for name in ("Tom", "Lily", "Sam")]

    async def all_of_them() -> list[ggmq.Result]:
        return await asyncio.gather(*(model.agenerate(p, temperature=0, max_tokens=12) for p in prompts))

    made = asyncio.run(all_of_them())
    assert [r.text for r in made[::17]] == [model.generate(p, temperature=0, max_tokens=12).text for p in prompts[::17]]


def test_streams_on_a_loop(model: ggmq.Model) -> None:
    async def pieces() -> tuple[list[str], ggmq.Result, ggmq.ChatResult]:
        async with model.agenerate(PROMPT, temperature=0, max_tokens=20, stream=True) as stream:
            got = [piece async for piece in stream]
            return got, await stream.result(), await model.achat("Hello", temperature=0, max_tokens=5)

    got, result, chat = asyncio.run(pieces())
    assert "".join(got) == result.text == model.generate(PROMPT, temperature=0, max_tokens=20).text
    assert chat.text == model.chat("Hello", temperature=0, max_tokens=5).text


def test_a_cancelled_task_cancels_its_answer_and_no_other(model: ggmq.Model) -> None:
    async def work() -> ggmq.Result:
        tasks = [asyncio.create_task(model.agenerate(PROMPT, ignore_eos=True)) for _ in range(6)]
        other = asyncio.create_task(model.agenerate(PROMPT, temperature=0, max_tokens=30))
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert any(isinstance(e, asyncio.CancelledError) for e in ended)
        async for _ in (stream := model.agenerate(PROMPT, ignore_eos=True, stream=True)):
            break
        await stream.aclose()
        assert (await stream.result()).finish_reason == "cancelled"
        return await other

    assert asyncio.run(work()).text == model.generate(PROMPT, temperature=0, max_tokens=30).text
    until(lambda: idle(model))


def test_errors_reach_who_awaits(model: ggmq.Model) -> None:
    with pytest.raises(ggmq.FormatError, match="do not fit a context of 512"):
        asyncio.run(model.agenerate("a " * 2000))
    with pytest.raises(ggmq.InvalidValue) as e:
        asyncio.run(model.achat([{"role": "nobody", "content": ""}]))
    assert e.value.param == "messages[0].role"
    with pytest.raises(ggmq.InvalidValue):
        asyncio.run(model.aembed(["a", ""]))


# -- texts that are only read ----------------------------------------------------------------------------------------------


def test_embeddings(model: ggmq.Model) -> None:
    texts = ["Tom and Lily went to the park.", "Tom and Lily went to the zoo.", "Once"]
    v = model.embed(texts)
    assert v.shape == (3, model.n_embd) and v.dtype == np.float32 and np.allclose((v * v).sum(1), 1, atol=1e-5)
    assert v[0] @ v[1] > v[0] @ v[2] and (model.embed(texts[1]) == v[1]).all()
    assert (asyncio.run(model.aembed(texts)) == v).all() and (asyncio.run(model.aembed(texts[0])) == v[0]).all()
    assert (model.embed([model.tokenize(t) for t in texts]) == v).all()
    hidden = model.hidden(texts[0]).astype(np.float64)
    plain = model.embed(texts, normalize=False)
    assert np.allclose(plain[0], hidden.mean(0), atol=1e-5)
    assert np.allclose(model.embed(texts[0], pooling="last", normalize=False), hidden[-1], atol=1e-5)
    assert model.embed([]).shape == (0, model.n_embd)
    for wrong, more in ((["a", ""], {}), (["a"], {"pooling": "rank"}), (["a"], {"pooling": "none"}), ([b"a"], {})):
        with pytest.raises(ggmq.InvalidValue):
            model.embed(wrong, **more)  # type: ignore[arg-type]
    until(lambda: idle(model))


def test_logits_are_those_of_the_token_loop(model: ggmq.Model) -> None:
    tokens = model.tokenize("Once upon a time, there was")
    rows = model.logits(tokens)
    assert rows.shape == (len(tokens), model.n_vocab) and rows.dtype == np.float32
    assert (model.logits("Once upon a time, there was") == rows).all()
    assert model.generate(tokens, temperature=0, max_tokens=1).tokens == [int(rows[-1].argmax())]


def test_logits_are_those_of_one_batch_on_one_device(model: ggmq.Model) -> None:
    tokens = model.tokenize("Tom saw a big dog.")
    with load(ModelConfig(BUNDLED, bus=BusConfig(workers=1, threads=1))) as plain:
        assert (plain.forward(tokens, 0, range(len(tokens))) == model.logits(tokens)).all()


def test_tokens_and_back(model: ggmq.Model) -> None:
    tokens = model.tokenize("Lily saw a cat.")
    assert model.detokenize(tokens).strip() == "Lily saw a cat." and tokens[0] == model._service.vocabulary.bos
    assert model.tokenize("Lily saw a cat.", add_special=False) == tokens[1:]
    assert model.detokenize(tokens, special=True) != model.detokenize(tokens)
    with pytest.raises(ggmq.InvalidValue, match="expected tokens of 0 to"):
        model.detokenize([10**6])


# -- what it says ----------------------------------------------------------------------------------------------------------


def test_a_cluster_shows_itself(model: ggmq.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repr(model.cluster) == "<ggmq.Cluster: local0/CPU, local1/CPU>"
    assert repr(model) == "<ggmq.Model stories: layers 0-1 on local0/CPU, 2-3 on local1/CPU; context 512>"
    page = model.cluster._repr_html_()
    assert page.count("<tr>") == 3 and "<td>stories 0-1</td>" in page and model.cluster.models == [model]
    device = model.cluster.devices[0]
    device.description = "<script>alert('x')</script>\x1b[2J"
    monkeypatch.setattr(ggmq.Cluster, "devices", [device])
    page = model.cluster._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;alert(&#x27;x&#x27;)" in page and "\x1b" not in page


def test_devices_have_names(model: ggmq.Model) -> None:
    cluster = model.cluster
    assert cluster.device("CPU").name == "local0/CPU" and cluster.device("local1/CPU").name == "local1/CPU"
    assert cluster.device(cluster.device("local1/CPU").index).name == "local1/CPU"
    with pytest.raises(ggmq.InvalidValue, match="there is no device 'CUDA0'; expected one of local0/CPU, local1/CPU"):
        cluster.device("CUDA0")


@pytest.mark.parametrize(("given", "param", "says"), [
    ({"temprature": 1}, "temprature", "did you mean temperature"), ({"max_tokens": "7"}, "max_tokens", "expected int"),
    ({"temperature": -1}, "temperature", "float >= 0.0, got -1"), ({"temperature": float("nan")}, "temperature", "nan"),
    ({"stop": ["a", 5]}, "stop[1]", "expected str, got int"), ({"stop": ""}, "stop", "not empty"),
    ({"logit_bias": {10**6: 1.0}}, "logit_bias", "of 0 to 793"), ({"json_schema": {"type": "foo"}}, "json_schema", "foo"),
    ({"regex": "a", "grammar": "b"}, "regex", "given by grammar already"), ({"regex": "("}, "regex", "regex"),
])  # fmt: skip
def test_what_an_option_may_be(model: ggmq.Model, given: dict[str, object], param: str, says: str) -> None:
    with pytest.raises(ggmq.InvalidValue) as e:
        model.generate(PROMPT, **given)  # type: ignore[call-overload]
    assert e.value.param == param and says in str(e.value) and str(e.value).startswith(param)


def test_what_is_no_prompt_and_no_model(model: ggmq.Model, tmp_path: Path) -> None:
    for prompt in (b"x", [0.5], [[1]], None):
        with pytest.raises(ggmq.InvalidValue, match="prompt: expected a text or its tokens"):
            model.generate(prompt)  # type: ignore[call-overload]
    with pytest.raises(ggmq.FormatError, match="expected tokens of 0 to 793"):
        model.generate([10**6])
    with pytest.raises(ggmq.FormatError, match="at least one token"):
        model.generate([])
    (tmp_path / "x.gguf").write_bytes(b"no model")
    with pytest.raises(ggmq.FormatError):
        ggmq.load(tmp_path / "x.gguf")
    for options_, says in (({"model": tmp_path / "y.gguf"}, "no such file"), ({"workers": -1}, "int >= 0"),
                           ({"model": BUNDLED, "hf_repo": "a/b"}, "named already"), ({"rpc": "host"}, "HOST:PORT"),
                           ({"activations": "f8"}, "activations"), ({"tensor_split": [0.0]}, "shares")):  # fmt: skip
        with pytest.raises(ggmq.InvalidValue, match=says):
            ggmq.load(**options_)  # type: ignore[arg-type]
    with pytest.raises(ggmq.InvalidValue, match=r"tcp://HOST:PORT, .*or a cluster's YAML file"):
        ggmq.connect("host:5")
    with pytest.raises(ggmq.ConfigError, match="no such file"):
        ggmq.connect(str(tmp_path / "cluster.yaml"))
    with pytest.raises(ggmq.ConfigError, match="guesses"):
        model.cluster.load(spec="draft")


def test_every_option_is_told_of() -> None:
    """By a docstring, and in the manual."""
    manual = (ROOT / "docs" / "python.md").read_text()
    kinds = (options.GenerateOptions, options.ChatOptions, options.BusOptions, options.ModelOptions, options.LoadOptions)
    told = "".join(kind.__doc__ or "" for kind in kinds)
    for kind in kinds:
        assert [name for name in kind.__annotations__ if name not in told or f"`{name}`" not in manual] == []


def test_names_come_when_they_are_used() -> None:
    code = """
        import sys, ggmq
        assert not {"numpy", "zmq", "msgspec", "ggmq.engine"} & sys.modules.keys()
        assert set(ggmq.__all__) <= set(dir(ggmq))
        for name in ggmq.__all__:
            getattr(ggmq, name)
        try:
            ggmq.nothing
        except AttributeError as e:
            assert "nothing" in str(e)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True, timeout=60)
    assert (ROOT / "ggmq" / "py.typed").exists()


# -- clusters and lives ----------------------------------------------------------------------------------------------------


def test_models_share_a_cluster() -> None:
    with ggmq.local_cluster(workers=1, threads=1) as cluster:
        one = cluster.load(BUNDLED, parallel=1)
        with cluster.load(parallel=1, ctx_size=128) as two:
            assert two.n_ctx == 128 and cluster.models == [one, two]
            texts = {m.generate(PROMPT, temperature=0, max_tokens=20).text for m in (one, two)}
            assert len(texts) == 1
        with pytest.raises(ggmq.Unavailable, match="closed"):
            two.generate(PROMPT)
        assert repr(two) == "<ggmq.Model stories: closed>" and one.generate(PROMPT, max_tokens=2).tokens
        client = cluster._opened.bus.client
        assert client.stats(0).n_buffers > 0
        del one  # nobody can ask it any more: its memory is free
        until(lambda: not client.stats(0).n_buffers)
        stream = cluster.load(parallel=1).generate(PROMPT, temperature=0, max_tokens=20, stream=True)
        assert cluster.models and "".join(stream) in texts  # who reads on keeps it
        del stream
        until(lambda: not client.stats(0).n_buffers)
        assert not cluster.models
    assert cluster.closed and repr(cluster) == "<ggmq.Cluster: closed>" and "closed" in cluster._repr_html_()
    with pytest.raises(ggmq.Unavailable, match="closed"):
        _ = cluster.devices
    cluster.close()


def script(body: str, **more: object) -> subprocess.Popen[bytes]:
    """A program that says `up` when its model is there, and then does `body`."""
    head = "import os, sys, time, ggmq\nmodel = ggmq.load(workers=2, threads=2, parallel=1)\nprint('up', flush=True)\n"
    return subprocess.Popen([sys.executable, "-c", head + textwrap.dedent(body)], cwd=ROOT, stdout=subprocess.PIPE,
                            **more)  # type: ignore[call-overload]  # fmt: skip


def alive(pids: list[int]) -> list[int]:
    """Those that run; one that nobody has waited for is over."""
    found = []
    for pid in pids:
        state = Path(f"/proc/{pid}/stat")
        if state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
            found.append(pid)
    return found


@pytest.mark.parametrize("end", ["exit", "raise", "sigterm", "sigkill", "sigint"])
def test_no_worker_outlives_its_program(end: str) -> None:
    body = {
        "exit": "model.generate('Once', max_tokens=5)",
        "raise": "model.chat('Hi', max_tokens=5); raise SystemExit(3)",
    }.get(end, "s = model.generate('Once', ignore_eos=True, stream=True); next(s); print('on', flush=True); time.sleep(60)")
    p = script(f"sys.stdin.readline(); {body}", stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert p.stdout is not None and p.stdin is not None and p.stdout.readline() == b"up\n"
        workers = children_of(p.pid)
        assert len(alive(workers)) == 2
        p.stdin.write(b"\n")
        p.stdin.flush()
        if end.startswith("sig"):
            # not before a token came: what the first one imports makes Python forget that it was interrupted, and end with 1
            assert p.stdout.readline() == b"on\n"
            p.send_signal(getattr(signal, end.upper()))
        code = p.wait(15)
        assert code == {"exit": 0, "raise": 3, "sigterm": -signal.SIGTERM, "sigkill": -signal.SIGKILL,
                        "sigint": -signal.SIGINT}[end]  # fmt: skip
        until(lambda: not alive(workers), 10)
    finally:
        p.kill()
        p.communicate()


def test_ctrl_c_ends_one_answer_and_the_model_goes_on() -> None:
    p = script("""
        n = 0
        try:
            while True:
                n += 1
                print(len(model.generate("Once", ignore_eos=True).tokens) > 0, flush=True)
        except KeyboardInterrupt:
            pass
        due = time.monotonic() + 5
        while any(slot.state != "idle" for slot in model._service.state().slots) and time.monotonic() < due:
            time.sleep(0.01)
        assert time.monotonic() < due
        print(repr(model.generate("Once upon a time", temperature=0, max_tokens=5).text), flush=True)
    """)
    try:
        assert p.stdout is not None and [p.stdout.readline() for _ in range(2)] == [b"up\n", b"True\n"]
        p.send_signal(signal.SIGINT)
        out, _ = p.communicate(timeout=30)
        assert p.returncode == 0 and out.splitlines()[-1] == b"', there was a little'"
    finally:
        p.kill()
        p.communicate()


def test_a_fork_ends_nothing_of_its_parent() -> None:
    p = script("""
        if not (pid := os.fork()):
            sys.exit(0)
        os.waitpid(pid, 0)
        assert len(model.generate("Once", max_tokens=3).tokens) == 3
    """)
    p.communicate(timeout=60)
    assert p.returncode == 0


def test_a_broker_elsewhere() -> None:
    broker = f"tcp://127.0.0.1:{free_port()}"
    with (
        started([*GGMQ, "broker", "--listen", broker, "--insecure"], stderr=subprocess.DEVNULL),
        started([*WORKER, "--broker", broker, "-t", "1", "--insecure", "--quiet", "--name", "den"]),
    ):
        await_devices(broker, 1)
        with ggmq.connect(broker, BUNDLED, insecure=True, parallel=1) as model:
            text = model.generate(PROMPT, temperature=0, max_tokens=10).text
            assert model.layers == [("den/CPU", 0, 4)]
        with ggmq.connect(broker, insecure=True) as cluster:
            assert [d.name for d in cluster.devices] == ["den/CPU"]
            assert cluster.load(parallel=1).generate(PROMPT, temperature=0, max_tokens=10).text == text
        assert model.closed
    with pytest.raises(ggmq.InvalidValue, match="expected a model with it"):
        ggmq.connect(broker, ctx_size=5)  # type: ignore[call-overload]


def test_a_cluster_that_is_up(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("""
name: api
security: {insecure: true}
workers:
  - {name: den, threads: 1}
""")
    up = subprocess.run([*GGMQ, "up", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    try:
        assert not up.returncode, up.stderr
        with ggmq.connect(str(file)) as cluster, cluster.load(parallel=1) as model:
            assert model.layers == [("den/CPU", 0, 4)] and model.generate(PROMPT, max_tokens=3).tokens
    finally:
        down = subprocess.run([*GGMQ, "down", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert not down.returncode, down.stderr
