"""Settings come from the environment, and a wrong one is named."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from perturbscope.cli import options
from perturbscope.client import access
from perturbscope.errors import InvalidParameterError
from serving.access.limits import LAST_WORDS
from serving.settings import BUNDLES, ROOT, Settings

DEPLOYMENTS = ("deploy/docker-compose.yml", "deploy/kubernetes.yml")


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
        ("HTTP_PORT", "tcp://here", "a whole number is needed"),
        ("CONNECTION_AGE", "tcp://10.0.0.11:3000", "a whole number is needed"),
        ("TRUSTED_PROXIES", "10.0.0.7/8", "TRUSTED_PROXIES holds '10.0.0.7/8'"),
        ("TRUSTED_PROXIES", "*", "10.0.0.7 or 10.0.0.0/8"),
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
    """Those of Services called perturbscope, perturbscope-gpu, and like the start of a setting, perturbscope-http."""
    environ = {
        f"{name}_{key}": value
        for name in ("PERTURBSCOPE", "PERTURBSCOPE_GPU", "PERTURBSCOPE_HTTP", "PERTURBSCOPE_GRPC")
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


def test_files_of_deployments_name_settings_and_wait_long_enough() -> None:
    """What is killed after its stop began had time for the drain delay and the grace, and five seconds more."""
    known = {f"PERTURBSCOPE_{item.name.upper()}" for item in fields(Settings)}
    texts = {name: (ROOT / name).read_text() for name in ("Dockerfile", *DEPLOYMENTS)}
    for name, text in texts.items():
        assert set(re.findall(r"PERTURBSCOPE_\w+", text)) <= known | {"PERTURBSCOPE_PORT"}, name
    in_the_image = int(re.findall(r"PERTURBSCOPE_DRAIN_DELAY=(\d+)", texts["Dockerfile"])[0])
    compose = yaml.safe_load(texts["deploy/docker-compose.yml"])["services"]["perturbscope"]
    grace = Settings().shutdown_grace + LAST_WORDS
    assert int(compose["stop_grace_period"].removesuffix("s")) > in_the_image + grace
    deployment, service = yaml.safe_load_all(texts["deploy/kubernetes.yml"])
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environ = {item["name"]: item["value"] for item in container["env"]}
    settings = Settings.from_env(environ)
    needed = settings.drain_delay + settings.shutdown_grace + LAST_WORDS
    assert pod["terminationGracePeriodSeconds"] > needed
    probe = container["readinessProbe"]
    assert settings.drain_delay > probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
    ports = {item["name"]: item["containerPort"] for item in container["ports"]}
    assert ports == {"http": settings.http_port, "grpc": settings.grpc_port}
    assert [item["port"] for item in service["spec"]["ports"]] == [settings.http_port, settings.grpc_port]
    assert not pod["enableServiceLinks"]
