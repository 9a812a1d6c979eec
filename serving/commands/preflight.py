"""Checks before the server starts: one that cannot serve says why, and does not start.

A worker that fails at start would be restarted again and again by its supervisor; so everything is tried once before
there are workers.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from perturbscope.errors import BundleError, InvalidParameterError, PerturbScopeError, ProviderUnavailableError
from perturbscope.inference.bundle import Bundle
from serving.commands import safety
from serving.models.loading import signature_check
from serving.models.repository import Repository
from serving.settings import BUNDLES, PREFIX, ROOT, Settings
from serving.telemetry import tracing


def check(settings: Settings, *, http: bool = False) -> None:
    """Check bundles, repository, keys, certificates, device and ports.

    Of the bundles in ``bundles/``, which are served where the settings name none, one must be good: a server finds out
    by itself which of the others are not, and says so.

    Parameters
    ----------
    settings
        Settings of the server.
    http
        Whether to check that the HTTP port is free too; False if this server holds its socket already.

    Raises
    ------
    BundleError
        A bundle is missing, damaged, unsupported, or lacks the variant or a signature that is required.
    ProviderUnavailableError
        The device of the settings cannot be used.
    InvalidParameterError
        The repository is no directory, there is no bundle at all, a port is taken, a file of keys or certificates
        cannot be used, or traces are to be sent over another protocol than gRPC.
    """
    checked_signature = signature_check(settings)
    for path in settings.bundles:
        bundle = Bundle.open(path)
        bundle.graph(settings.variant)
        checked_signature(bundle)
    if settings.repository and not Path(settings.repository).is_dir():
        raise InvalidParameterError(
            f"{PREFIX}REPOSITORY is {settings.repository}, which is no directory. Make it, or mount it.",
            field="repository",
        )
    if not settings.bundles and not settings.repository:
        _check_own_bundles(settings)
    safety.check(settings)
    check_device(settings)
    tracing.wanted()
    if http:
        check_port(settings.host, settings.http_port, "HTTP_PORT")
    check_port(settings.host, settings.grpc_port, "GRPC_PORT")


def _check_own_bundles(settings: Settings) -> None:
    """Check that one of the bundles that come with the server can be served. Raises as :func:`check`."""
    good, errors = _first_good(_bundles_in(BUNDLES), settings)
    if good is not None:
        return
    if not errors:
        raise InvalidParameterError(
            f"{BUNDLES} holds no bundle, and none is named. Name one with --bundle DIR or {PREFIX}BUNDLE, or a folder "
            f"of them with {PREFIX}REPOSITORY; or make one: python -m export CHECKPOINT {BUNDLES / 'NAME'}.",
            field="bundle",
        )
    raise (
        errors[0]
        if len(errors) == 1
        else BundleError(
            f"None of the bundles in {BUNDLES} can be served: {' '.join(error.message for error in errors)}"
        )
    )


def _bundles_in(folder: Path | None) -> list[Path]:
    """The bundles of a repository, the default one first; none if it cannot be read."""
    try:
        return [snapshot.path for snapshot in Repository((), folder).scan().bundles.values()]
    except OSError:
        return []


def _first_good(paths: Iterable[Path], settings: Settings) -> tuple[Path | None, list[BundleError]]:
    """Return the first bundle that can be opened and has the variant, and what is wrong with those before it."""
    errors, checked_signature = [], signature_check(settings)
    for path in paths:
        try:
            bundle = Bundle.open(path)
            bundle.graph(settings.variant)
            checked_signature(bundle)
        except BundleError as error:
            errors.append(error)
        else:
            return path, errors
    return None, errors


def check_device(settings: Settings) -> None:
    """Run a model on the device, the default one if it is good. Raises ProviderUnavailableError if that fails."""
    if settings.device == "cpu":
        return
    import onnxruntime as ort

    if "CUDAExecutionProvider" in ort.get_available_providers():
        # A listed provider can still fail to load. Try it in a process of its own, so that its memory on the device is
        # given back.
        command = [sys.executable, "-m", "serving.commands.preflight"]
        trial = subprocess.run(  # noqa: S603  our own module, no shell
            command, env=_environment(settings), cwd=ROOT, capture_output=True, text=True, check=False
        )
        if trial.returncode == 0:
            return
        lines = trial.stderr.strip().splitlines()
        raise ProviderUnavailableError(lines[-1] if lines else "The device could not be tried.", field="device")
    raise ProviderUnavailableError(
        f"The device {settings.device!r} was asked for ({PREFIX}DEVICE), but this onnxruntime offers only "
        f"{', '.join(ort.get_available_providers())}. Install onnxruntime-gpu in place of onnxruntime, "
        "or choose the device 'cpu'.",
        field="device",
    )


def check_port(host: str, port: int, variable: str) -> None:
    """Raise InvalidParameterError if the server cannot listen on the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InvalidParameterError(
                f"Cannot listen on {host}:{port}: {error.strerror}. Stop what listens there, or give another port "
                f"({PREFIX}{variable}).",
                field=variable.lower(),
            ) from error


def _environment(settings: Settings) -> dict[str, str]:
    return {**os.environ, **settings.to_env(), "PYTHONPATH": str(ROOT)}


def _try_device() -> int:
    from serving.models.loading import ServedModel

    settings = Settings.from_env()
    paths = (*settings.bundles, *_bundles_in(BUNDLES), *_bundles_in(settings.repository_path))
    path, _ = _first_good(paths, settings)
    if path is None:
        return 0  # a repository that is filled later
    try:
        ServedModel.load(path, settings)
    except PerturbScopeError as error:
        sys.stderr.write(error.message.replace("\n", " ") + "\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(_try_device())
