"""cluster.yaml and deploy/aws.yaml are what `ray up` accepts, and keep the nodes of brokers."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
PATHS = [ROOT / "cluster.yaml", ROOT / "deploy/aws.yaml"]
KUBERAY = ROOT / "deploy/kuberay"

each_file = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)


def load(path: Path) -> dict[str, Any]:
    """A file as `ray up` reads it."""
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    return config


def schema() -> dict[str, Any]:
    """The schema that Ray has with it, without importing Ray."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.submodule_search_locations
    text = Path(spec.submodule_search_locations[0], "autoscaler/ray-schema.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


@each_file
def test_it_is_of_rays_schema(path: Path) -> None:
    config = load(path)
    jsonschema.validate(config, schema())
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate({**config, "max_worker": 2}, schema())


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
@each_file
def test_ray_accepts_it_with_its_defaults(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load(path))
    validate_config(config)
    workers = sum(each.get("min_workers", 0) for each in config["available_node_types"].values())
    assert workers == config["max_workers"] == 2, "the autoscaler may take nodes away"


@each_file
def test_it_installs_what_it_starts(path: Path) -> None:
    config = load(path)
    setup = "\n".join(config["setup_commands"])
    assert config["file_mounts"]["~/raftlog"] == "."
    assert re.search(r"~/raftlog-venv/bin/pip install .*~/raftlog$", setup, re.MULTILINE)
    for kind in ("head", "worker"):
        stop, start = config[f"{kind}_start_ray_commands"]
        assert stop == "~/raftlog-venv/bin/ray stop"
        assert "~/raftlog-venv/bin/ray start" in start
    assert "RAY_AUTH_MODE=token" in setup, "whoever reaches the cluster may run what he likes on it"
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_all_deployments_have_the_same_ray_and_raftlog() -> None:
    texts = [path.read_text() for path in (*PATHS, *KUBERAY.iterdir())]
    rays = set().union(
        *(re.findall(r"(?:ray\[default\]==|rayproject/ray:|rayVersion: \")([\d.]+)", each) for each in texts)
    )
    assert len(rays) == 1, rays
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert set().union(*(re.findall(r"\braftlog:(\d[\d.]*)", each) for each in texts)) == {version[1]}


def test_on_aws_nobody_takes_a_broker_or_its_disk_away() -> None:
    config = load(PATHS[1])
    assert config["idle_timeout_minutes"] > 24 * 60
    assert config["provider"]["cache_stopped_nodes"]
    for kind in config["available_node_types"].values():
        node = kind["node_config"]
        assert "InstanceMarketOptions" not in node, "Ray's default for workers is spot"
        (data,) = [each for each in node["BlockDeviceMappings"] if each["DeviceName"] != "/dev/sda1"]
        assert data["Ebs"]["DeleteOnTermination"] is False
    assert any("mount /data" in command for command in config["initialization_commands"])
