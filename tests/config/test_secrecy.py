"""What counts as a secret, and what only sounds like one."""

from __future__ import annotations

import pytest

from podquant.config.secrecy import is_secret


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "hf_x"),
        ("hf_token", "hf_x"),
        ("HF_HUB_TOKEN_2", "hf_x"),
        ("FSSPEC_GCS_TOKEN", "ya29.x"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("PODQUANT_API_KEY", "x"),
        ("PODQUANT_GROUP_SECRET", "x"),
        ("api_key", "x"),
        ("DB_PASSWORD", "x"),
        ("GOOGLE_CREDENTIALS", "{}"),
        ("OPENAI_APIKEY", "x"),
        ("HTTPS_PROXY", "http://user:word@proxy:3128"),
        ("HF_ENDPOINT", "https://token@mirror.example"),
    ],
)
def test_secrets(name: str, value: str) -> None:
    assert is_secret(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN_PATH", "/etc/hf/token"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/etc/gcp/key.json"),
        ("api_key_file", "/etc/podquant/key"),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"),
        ("FSSPEC_GCS_TOKEN", "anon"),
        ("TOKENIZERS_PARALLELISM", "x"),
        ("max_total_tokens", "x"),
        ("KEYBOARD", "x"),
        ("RAY_AUTH_MODE", "token"),
        ("HF_ENDPOINT", "https://mirror.example/a@b"),
        ("HF_HOME", "/cache"),
    ],
)
def test_what_only_sounds_like_one(name: str, value: str) -> None:
    assert not is_secret(name, value)
