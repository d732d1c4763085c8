"""cluster.yaml is what `ray up` accepts: its schema is strict."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

PATH = Path(__file__).parents[2] / "cluster.yaml"


@pytest.mark.ray
def test_ray_accepts_it() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(PATH.read_text()))
    validate_config(config)
    assert config["provider"]["type"] == "local"
    with pytest.raises(Exception, match="max_worker"):
        validate_config({**config, "max_worker": 2})


def test_it_installs_what_it_starts() -> None:
    config = yaml.safe_load(PATH.read_text())
    commands = " ".join(config["setup_commands"])
    assert "~/raftlog-venv" in commands
    assert all(target in commands for target in config["file_mounts"])
