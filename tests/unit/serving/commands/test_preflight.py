"""Checks before there are workers, and the command that serves."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perturbscope.errors import BundleError, InvalidParameterError, ProviderUnavailableError
from serving.commands import preflight
from serving.commands import serve as command
from serving.settings import Settings
from tests.bundles import write_tiny_bundle
from tests.ports import free_ports


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that something listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


@pytest.fixture
def free() -> int:
    return free_ports(1)[0]


def settings(bundle: Path, **changes: Any) -> Settings:
    return Settings(**{"bundle": str(bundle), "host": "127.0.0.1", "threads": 1, **changes})


def test_what_can_be_served_passes(tiny_bundle: Path, free: int) -> None:
    preflight.check(settings(tiny_bundle, grpc_port=free))


def test_a_variant_that_is_not_there(tiny_bundle: Path, free: int) -> None:
    with pytest.raises(BundleError, match="no variant 'int8'"):
        preflight.check(settings(tiny_bundle, grpc_port=free, variant="int8"))


def test_a_repository_must_be_a_directory(tmp_path: Path, free: int) -> None:
    missing = Settings(repository=str(tmp_path / "models"), grpc_port=free, threads=1)
    with pytest.raises(InvalidParameterError, match=r"PERTURBSCOPE_REPOSITORY is .*models, which is no directory"):
        preflight.check(missing)
    (tmp_path / "models").mkdir()
    preflight.check(missing)


def test_one_of_the_bundles_that_come_with_the_server_must_be_good(
    tmp_path: Path, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = tmp_path / "bundles"
    monkeypatch.setattr(preflight, "BUNDLES", bundles)
    wanted = Settings(grpc_port=free, threads=1)
    with pytest.raises(
        InvalidParameterError, match=r"bundles holds no bundle.* Name one .* or make one: python -m export"
    ):
        preflight.check(wanted)
    (bundles / "default").mkdir(parents=True)
    (bundles / "default" / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match=r"default/manifest.json has no format_version"):
        preflight.check(wanted)
    (bundles / "other").mkdir()
    (bundles / "other" / "manifest.json").write_text("[")
    with pytest.raises(
        BundleError, match=r"None of the bundles .*default/manifest.json has no.*other/manifest.json is"
    ):
        preflight.check(wanted)
    write_tiny_bundle(bundles / "tiny")
    preflight.check(wanted)


def test_taken_ports_name_their_variable(tiny_bundle: Path, free: int, taken: int) -> None:
    with pytest.raises(InvalidParameterError, match=rf"127.0.0.1:{taken}.*PERTURBSCOPE_GRPC_PORT"):
        preflight.check(settings(tiny_bundle, grpc_port=taken))
    busy = settings(tiny_bundle, grpc_port=free, http_port=taken)
    preflight.check(busy)
    with pytest.raises(InvalidParameterError, match=rf"127.0.0.1:{taken}.*PERTURBSCOPE_HTTP_PORT"):
        preflight.check(busy, http=True)


def test_an_accelerator_that_is_not_offered(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderUnavailableError, match=r"\(PERTURBSCOPE_DEVICE\).* offers only CPUExecutionProvider"):
        preflight.check_device(settings(tiny_bundle, device="cuda"))


def test_an_accelerator_that_is_offered_is_tried_in_another_process(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(ProviderUnavailableError, match="The device 'cuda' was asked for") as refused:
        preflight.check_device(settings(tiny_bundle, device="cuda"))
    assert "Traceback" not in refused.value.message


def test_options_override_the_environment_and_paths_become_absolute(
    tiny_bundle: Path, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    def execve(_: str, arguments: list[str], environ: dict[str, str]) -> None:
        started.append((arguments, environ))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.chdir(tiny_bundle.parent)
    monkeypatch.setenv("PERTURBSCOPE_BUNDLE", "elsewhere")
    monkeypatch.setenv("PERTURBSCOPE_MAX_CELLS", "7")
    http = str(free_ports(1)[0])
    ports = ["--grpc-port", str(free), "--http-port", http]
    with pytest.raises(SystemExit):
        command.main(["--bundle", tiny_bundle.name, "--host", "127.0.0.1", *ports])
    ((arguments, environ),) = started
    assert arguments[2:5] == ["bentoml", "serve", "serving.service:PerturbScope"]
    assert arguments[-4:] == ["--host", "127.0.0.1", "--port", http]
    assert Settings.from_env(environ).bundles == (tiny_bundle.absolute(),)
    assert Settings.from_env(environ).max_cells == 7
    assert environ["BENTOML_DO_NOT_TRACK"] == "True"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--bundle", "/nowhere"], 2, "/nowhere is not a bundle"),
        (["--device", "tpu"], 2, "must be one of cpu, cuda"),
        (["--http-port", "3001"], 2, "cannot share the port"),
    ],
)
def test_it_ends_with_one_line_and_a_code(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == code
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
