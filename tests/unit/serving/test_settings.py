"""Settings come from the environment, and a wrong one is named."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from perturbscope.cli import options
from perturbscope.client import access
from perturbscope.errors import InvalidParameterError
from serving.settings import BUNDLES, Settings


def test_an_empty_environment_means_the_defaults() -> None:
    settings = Settings.from_env({})
    assert settings == Settings()
    assert (settings.bundles, settings.repository_path) == ((), BUNDLES)
    assert (settings.http_port, settings.grpc_port, settings.device) == (3000, 3001, "cpu")


def test_every_setting_survives_the_environment() -> None:
    odd = {
        item.name: getattr(Settings(), item.name) + 1 if isinstance(item.default, int) else str(item.default)
        for item in fields(Settings)
    }
    settings = Settings(**{**odd, "bundle": "/a:/b", "grpc_port": 5000})
    assert Settings.from_env(settings.to_env()) == settings
    assert settings.bundles == (Path("/a"), Path("/b"))


def test_what_is_named_takes_the_place_of_the_bundles_that_come_with_the_server() -> None:
    named = Settings(bundle="/a")
    assert (named.bundles, named.repository_path) == ((Path("/a"),), None)
    watched = Settings(repository="/models")
    assert (watched.bundles, watched.repository_path) == ((), Path("/models"))
    both = Settings(repository="/models", bundle="/a")
    assert (both.bundles, both.repository_path) == ((Path("/a"),), Path("/models"))
    assert Settings(repository="/models", repository_poll=0, max_model_bytes=0).repository_poll == 0


def test_an_empty_variable_is_an_unset_one() -> None:
    assert Settings.from_env({"PERTURBSCOPE_DEVICE": "", "PERTURBSCOPE_HTTP_PORT": ""}) == Settings()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HTTP_PORT", "eighty", "PERTURBSCOPE_HTTP_PORT is 'eighty'; a whole number is needed"),
        ("HTTP_PORT", "tcp://10.0.0.11:3000", "a Service called perturbscope-http: write enableServiceLinks: false"),
        ("GRPC_PORT", "tcp://10.0.0.11:3001", "or set PERTURBSCOPE_GRPC_PORT there"),
        ("HTTP_PORT", "70000", "ports end at 65535"),
        ("GRPC_PORT", "3000", "cannot share the port 3000"),
        ("DEVICE", "tpu", "must be one of cpu, cuda"),
        ("MAX_CELLS", "0", "PERTURBSCOPE_MAX_CELLS is 0"),
        ("THREADS", "-1", "PERTURBSCOPE_THREADS is -1"),
        ("MAX_HELD_BYTES", "5", "less than one request may have"),
        ("BUNDLE", ":", "names no directory"),
    ],
)
def test_a_wrong_value_is_named(variable: str, value: str, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        Settings.from_env({f"PERTURBSCOPE_{variable}": value})


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("PORT", "PERTURBSCOPE_GRPC_PORT or PERTURBSCOPE_HTTP_PORT"),
        ("LOGLEVEL", "PERTURBSCOPE_LOG_LEVEL"),
        ("SERVICE_PORT", "PERTURBSCOPE_"),  # a setting of nobody without the variables beside it
    ],
)
def test_an_unknown_variable_is_named_with_the_nearest_settings(variable: str, nearest: str) -> None:
    with pytest.raises(InvalidParameterError, match=rf"PERTURBSCOPE_{variable} is not a setting.* Is {nearest}"):
        Settings.from_env({f"PERTURBSCOPE_{variable}": "80"})


def test_a_variable_like_no_setting_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match=r"PERTURBSCOPE_QQQ is not .* server\. Correct"):
        Settings.from_env({"PERTURBSCOPE_QQQ": "1"})


def test_variables_of_the_client_do_not_stop_a_server() -> None:
    names = [access.KEY, access.KEY_FILE, access.CA, access.CERTIFICATE, access.PRIVATE_KEY]
    names += [options.KEY_VARIABLE, options.KEY_FILE_VARIABLE, options.CA_VARIABLE, "PERTURBSCOPE_DEBUG"]
    assert Settings.from_env(dict.fromkeys(names, "x")) == Settings()


def test_variables_that_kubernetes_sets_for_a_service_do_not_stop_a_server() -> None:
    """Those of a Service called perturbscope, and of one called perturbscope-gpu."""
    environ = {
        f"{name}_{key}": value
        for name in ("PERTURBSCOPE", "PERTURBSCOPE_GPU")
        for key, value in {
            "SERVICE_HOST": "10.0.0.11",
            "SERVICE_PORT": "3000",
            "SERVICE_PORT_HTTP": "3000",
            "PORT": "tcp://10.0.0.11:3000",
            "PORT_3000_TCP": "tcp://10.0.0.11:3000",
            "PORT_3000_TCP_PROTO": "tcp",
            "PORT_3000_TCP_PORT": "3000",
            "PORT_3000_TCP_ADDR": "10.0.0.11",
        }.items()
    }
    assert Settings.from_env(environ) == Settings()
    with pytest.raises(InvalidParameterError, match="PERTURBSCOPE_PORT is not a setting"):
        Settings.from_env({**environ, "PERTURBSCOPE_PORT": "80"})
