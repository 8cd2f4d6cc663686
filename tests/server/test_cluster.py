"""What a server tells of its cluster."""

from __future__ import annotations

import json

import httpx

from tests.support.serving import Running


def test_a_snapshot_says_what_lies_where_and_what_the_slots_do(server: Running) -> None:
    s = server.get("/cluster").json()
    (model,) = s["models"]
    assert model["name"] == "stories" and model["n_layers"] == 4 and model["n_params"] > 1_000_000
    (worker,) = s["hosts"][0]["workers"]
    assert worker["state"] == "ready" and worker["name"] == "local0"
    (device,) = worker["devices"]
    assert 0 < device["free_bytes"] <= device["total_bytes"]
    (held,) = device["layers"]
    assert (held["first"], held["last"], held["embedding"], held["output"]) == (0, 3, True, True)
    assert held["weight_bytes"] > 0 and held["kv_bytes"] > 0
    assert [slot["id"] for slot in s["slots"]] == [0, 1, 2, 3] and s["queue"]["limit"] == 256 and s["error"] == ""


def test_events_tell_the_same_again_and_again(server: Running) -> None:
    with httpx.stream("GET", server.url + "/cluster/events", timeout=30) as events:
        told = (json.loads(line[6:]) for line in events.iter_lines() if line.startswith("data: "))
        first, second = next(told), next(told)
    assert second["uptime_s"] >= first["uptime_s"] > 0 and second["models"] == first["models"]
