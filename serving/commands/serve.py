"""``python -m serving``: check everything, then hand over to ``bentoml serve``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from perturbscope.errors import BundleError, InvalidParameterError, PerturbScopeError
from perturbscope.threads import blas_variables
from serving.access import tls
from serving.commands import preflight
from serving.settings import PREFIX, ROOT, Settings

OPTIONS = {
    "bundle": "bundle directory; several separated by ':'; by default every bundle in bundles/ beside serving/",
    "repository": "directory of bundle directories, which is watched",
    "variant": "graph of the bundle: fp32, fp16, fp16-flash, int8",
    "device": "cpu, cuda or tensorrt",
    "host": "address to listen on; 127.0.0.1 by default",
    "signers": "public keys that are trusted to sign bundles, files or folders separated by ':'",
    "keys": "file of API keys, see python -m serving keys",
    "tls_certificate": "file with the server's certificate",
    "tls_key": "file with its private key",
    "tls_client_ca": "file with the authorities of clients' certificates; clients without one are refused",
    "http_port": "port of the HTTP server",
    "grpc_port": "port of the gRPC server",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until stopped.

    Returns
    -------
    2 for a bad option, setting or bundle, 1 if the server cannot start. Otherwise this process becomes BentoML's.
    """
    try:
        settings = _settings(arguments)
        preflight.check(settings, http=True)
    except PerturbScopeError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 2 if isinstance(error, InvalidParameterError | BundleError) else 1
    return _become_bentoml(settings)


def _become_bentoml(settings: Settings) -> NoReturn:
    command = [sys.executable, "-m", "bentoml", "serve", "serving.service:PerturbScope"]
    command += ["--working-dir", str(ROOT), "--host", settings.host, "--port", str(settings.http_port)]
    command += tls.bentoml_options(settings)
    # An uploaded file may ask HDF5 for a plugin: no library is ever loaded for one.
    closed = {"HDF5_PLUGIN_PRELOAD": "::"}
    # gRPC writes a line of its own to stderr for each message that it refuses, and callers choose how many those are.
    # glibc gives each of the many threads a heap of its own, up to eight per core, and each keeps its largest size.
    environment = {
        "BENTOML_DO_NOT_TRACK": "True",
        "MALLOC_ARENA_MAX": "2",
        "GRPC_VERBOSITY": "NONE",
        **blas_variables(),
        **os.environ,
        **settings.to_env(),
        **closed,
    }
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)  # noqa: S606  no shell is wanted


def _settings(arguments: Sequence[str] | None) -> Settings:
    """Return the settings of the environment and the options; paths are absolute, as BentoML changes the directory."""
    parser = argparse.ArgumentParser(
        prog="python -m serving",
        description="Serve PerturbScope bundles.",
        epilog="Without --bundle and --repository, every bundle in bundles/ is served; the one called default, or else "
        "the first by name, answers requests that name no model. Other commands: python -m serving keys, "
        "python -m serving healthcheck.",
    )
    for name, text in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{text} (or {PREFIX}{name.upper()})")
    options = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    environ = {**os.environ, **{PREFIX + name.upper(): value for name, value in options.items()}}
    settings = Settings.from_env(environ)
    values = {item.name: getattr(settings, item.name) for item in fields(settings)}
    for name in ("bundle", "signers"):
        parts = [part for part in values[name].split(os.pathsep) if part]
        values[name] = os.pathsep.join(str(Path(part).absolute()) for part in parts)
    for name in ("repository", "keys", "tls_certificate", "tls_key", "tls_client_ca"):
        values[name] = str(Path(values[name]).absolute()) if values[name] else ""
    return Settings(**values)
