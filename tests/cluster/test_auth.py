"""API keys and the rule about addresses."""

from __future__ import annotations

import pytest

from kvasir.cluster.auth import ApiKeys, UnauthenticatedError, check_exposure, is_local, load_keys
from kvasir.cluster.config import GatewayConfig
from kvasir.engine.errors import ConfigError


def test_keys_from_flags_file_and_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nfrom-file\n\nsecond \n")
    config = GatewayConfig(api_key=("flag",), api_key_file=str(file))
    keys = load_keys(config, {"KVASIR_API_KEY": "one, two", "VLLM_API_KEY": "three"})
    for key in ("flag", "from-file", "second", "one", "two", "three"):
        keys.check(f"Bearer {key}")
        keys.check(f"bearer {key}")
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer flag2",
        "Bearer one, two",
        "flag",
        "Basic flag",
        "Bearer # ours",
    ):
        with pytest.raises(UnauthenticatedError):
            keys.check(wrong)
    assert "flag" not in repr(vars(keys))


def test_no_key_lets_everybody_in():
    keys = load_keys(GatewayConfig(), {"KVASIR_API_KEY": " , "})
    assert not keys
    keys.check(None)
    assert ApiKeys(["a"])


def test_files_that_hold_no_key(tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("\n# nothing\n")
    for path in (empty, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="--api-key-file") as caught:
            load_keys(GatewayConfig(api_key_file=str(path)), {})
        assert caught.value.param == "api_key_file"


@pytest.mark.parametrize(("host", "local"), [
    ("127.0.0.1", True), ("127.8.0.1", True), ("localhost", True), ("::1", True), ("[::1]", True),
    ("0.0.0.0", False), ("::", False), ("10.0.0.7", False), ("example.org", False), ("", False),
])  # fmt: skip
def test_what_is_local(host, local):
    assert is_local(host) is local


def test_beyond_localhost_only_with_a_key_or_insecure():
    check_exposure(GatewayConfig(), {})
    check_exposure(GatewayConfig(host="0.0.0.0", api_key=("k",)), {})
    check_exposure(GatewayConfig(host="0.0.0.0"), {"VLLM_API_KEY": "k"})
    check_exposure(GatewayConfig(host="0.0.0.0", insecure=True), {})
    with pytest.raises(ConfigError, match="--insecure") as caught:
        check_exposure(GatewayConfig(host="0.0.0.0"), {})
    assert caught.value.param == "host"
