"""What the hosts of a cluster are sent of this process's environment."""

from __future__ import annotations

import json
import logging

import pytest

from podquant.app.environment import worker_environment
from podquant.config.job import ClusterOptions


def test_hosts_are_told_how_storage_is_reached_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {
        "HF_TOKEN": "hf_planted",
        "HF_HOME": "/cache",
        "HF_TOKEN_PATH": "/etc/hf/token",
        "HF_ENDPOINT": "https://user:planted@mirror",
        "FSSPEC_GCS_TOKEN": "ya29.planted",
        "STORAGE_EMULATOR_HOST": "http://127.0.0.1:1",
        "PODQUANT_API_KEY": "planted",
        "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": {"A_KEY": "planted", "B": "x"}}}),
    }.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        sent = worker_environment(ClusterOptions(env={"XLA_FLAGS": "x"}))
    assert "planted" not in "".join(sent.values()) + caplog.text
    assert {"HF_HOME": "/cache", "HF_TOKEN_PATH": "/etc/hf/token", "XLA_FLAGS": "x"}.items() <= sent.items()
    assert sent["STORAGE_EMULATOR_HOST"] == "http://127.0.0.1:1"
    assert "FSSPEC_GCS_TOKEN, HF_ENDPOINT, HF_TOKEN: not sent to the hosts, since Ray would write it" in caplog.text
    assert "A_KEY: is in the job's runtime_env, which Ray has written to disk on every host" in caplog.text
