"""The container files start the example with flags that it takes on their number of ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from flags import parse_flags

DOCKER = Path(__file__).parents[2] / "docker"


def read(name):
    return list(yaml.safe_load_all((DOCKER / name).read_text(encoding="utf-8")))


def services():
    """Name → service of the two compose files; an engine merges them likewise."""
    found = {}
    for name in ("compose.yaml", "compose.nodes.yaml"):
        (document,) = read(name)
        for service, fields in document["services"].items():
            found[service] = {**found.get(service, {}), **fields}
    return found


def commands():
    found = {name: service["command"] for name, service in services().items()}
    for document in read("kubernetes/job.yaml"):
        if document["kind"] == "Job":
            (container,) = document["spec"]["template"]["spec"]["containers"]
            found["pod"] = container["command"]
    found["image"] = json.loads(
        re.search(r"^CMD (.+)$", (DOCKER / "Dockerfile").read_text(), re.M)[1]
    )
    return {name: words for name, words in found.items() if words[0] == "torchrun"}


def option(words, name):
    given = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return int(given[0]) if given else 1


@pytest.mark.parametrize("name", ["trainer", "node-0", "node-1", "pod", "image"])
def test_the_example_takes_the_flags_on_so_many_ranks(name, monkeypatch):
    words = commands()[name]
    ranks = option(words, "nnodes") * option(words, "nproc-per-node")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    at = words.index("/opt/examples/train.py")
    assert parse_flags("", words[at + 1 :]).save
    assert ranks > 1


def test_what_stops_a_job_leaves_time_for_what_it_stops():
    """The trainer's notice of 30 s, within torchrun's patience, within the engine's."""
    found = {
        name: service for name, service in services().items() if "stop_grace_period" in service
    }
    assert set(found) == {"trainer", "node-0", "node-1"}
    for name, service in found.items():
        patience = option(service["command"], "shutdown-timeout")
        assert 30 < patience < int(service["stop_grace_period"].removesuffix("s")), name


def test_both_nodes_are_one_job():
    first, second = (services()[name] for name in ("node-0", "node-1"))
    assert first == second
    assert option(first["command"], "nnodes") == 2
