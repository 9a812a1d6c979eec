"""Settings of the server, from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from perturbscope.errors import InvalidParameterError
from perturbscope.inference.encoder import Device
from perturbscope.inference.gpu import MAX_TOKENS
from serving.telemetry.log import Format, Level

PREFIX = "PERTURBSCOPE_"
_MAY_BE_ZERO = ("threads", "repository_poll", "max_model_bytes", "max_batch_tokens")
ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds ``serving/`` and ``bundles/``: the checkout, or the image's."""
DEFAULT_BUNDLE = ROOT / "bundles" / "default"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the server runs. Field `x` is read from the environment variable ``PERTURBSCOPE_X``.

    Raises
    ------
    InvalidParameterError
        A value outside its range.
    """

    bundle: str = ""
    """Bundle directories, separated by ``:``; the first one is the default model. Empty: the bundle that comes with the
    server, or none where there is a repository."""
    repository: str = ""
    """Directory of bundle directories, which may come, change and go while the server runs; empty: none."""
    repository_poll: int = 10
    """Seconds between two looks into the repository; 0: models come and go only on request."""
    max_model_bytes: int = 0
    """Memory that all loaded models may take, as estimated; 0: no limit."""
    variant: str = "fp32"
    """Graph of the bundle: fp32, fp16, fp16-flash, int8."""
    device: str = "cpu"
    """cpu, cuda or tensorrt; there is no fallback from one to the other."""
    engine_cache: str = ""
    """Directory where TensorRT keeps its engines, each of which takes minutes to build; empty: nowhere."""
    threads: int = 0
    """CPU threads of the model; 0: the cores that the process may use."""
    host: str = "127.0.0.1"
    """Address that both servers listen on; the image sets 0.0.0.0, since a container has interfaces of its own."""
    keys: str = ""
    """File of API keys, made by ``python -m serving keys``; empty: everyone may come in."""
    tls_certificate: str = ""
    """File with the server's certificate and those above it (PEM), for both servers; empty: no TLS."""
    tls_key: str = ""
    """File with the certificate's private key (PEM)."""
    tls_client_ca: str = ""
    """File with the authorities (PEM) one of which must have signed a client's certificate; empty: none is asked."""
    http_port: int = 3000
    """Port of the HTTP server."""
    grpc_port: int = 3001
    """Port of the gRPC server."""
    max_cells: int = 20_000
    """Cells of one request that are embedded."""
    max_vectors: int = 200_000
    """Rows of one score request that brings its own embeddings."""
    max_genes: int = 100_000
    """Columns of one matrix."""
    max_values: int = 200_000_000
    """Stored counts of one matrix: bounds what a compressed upload can grow to."""
    max_body_bytes: int = 256 * 2**20
    """Bytes of one request, over HTTP and over gRPC."""
    body_timeout: int = 300
    """Seconds within which the body of a request must have arrived."""
    head_timeout: int = 30
    """Seconds within which an HTTP connection must have sent the head of a request, and gRPC's its greeting."""
    file_timeout: int = 120
    """Seconds within which an uploaded file must have been read; a damaged one can keep libhdf5 busy for ever."""
    stream_chunks: int = 4
    """Chunks of one stream in progress; the next one is read when an answer was taken."""
    max_chunk_bytes: int = 32 * 2**20
    """Bytes of one chunk of a stream. All of a stream in progress never have more than max_body_bytes."""
    request_timeout: int = 3600
    """Seconds after which BentoML answers an HTTP request with 504; over gRPC the caller's deadline holds."""
    max_json_bytes: int = 32 * 2**20
    """Bytes of one body of JSON, which takes ten times the memory and the time of the other forms."""
    max_held_bytes: int = 2**30
    """Memory that all requests in progress may hold: their bodies, and as estimated what these are decoded to, tokens,
    vectors and encoded answers."""
    max_requests: int = 256
    """Requests in progress, over both transports."""
    max_queued_tokens: int = 4_194_304
    """Tokens that wait for the model; 2,048 cells of 2,048 tokens."""
    max_batch_tokens: int = 0
    """Padded tokens of one batch, which is also what a small request waits for at most twice; 0: 4,096 on a CPU, which
    gains nothing by more, and 65,536 on an accelerator."""
    inference_timeout: int = 120
    """Seconds after which a forward pass is taken to hang: callers are told, and the model is not ready."""
    max_permutations: int = 100_000
    """Permutations and null draws that one score request may ask for."""
    max_group_cells: int = 5_000
    """Cells of a group that one score request may ask to be compared in full; memory grows with its square."""
    score_workers: int = 1
    """Score requests that are computed at a time."""
    shutdown_grace: int = 30
    """Seconds that requests in progress are given at shutdown."""
    log_format: str = "auto"
    """json, text, or auto: text on a terminal, JSON elsewhere."""
    log_level: str = "info"
    """debug, info, warning, error: the least that is logged."""

    def __post_init__(self) -> None:
        if self.device not in get_args(Device):
            raise InvalidParameterError(
                f"{PREFIX}DEVICE is {self.device!r}; it must be one of {', '.join(get_args(Device))}.", field="device"
            )
        for name, allowed in (("log_format", get_args(Format)), ("log_level", get_args(Level))):
            if getattr(self, name) not in allowed:
                raise InvalidParameterError(
                    f"{_variable(name)} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.", field=name
                )
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int) and value < (0 if item.name in _MAY_BE_ZERO else 1):
                raise InvalidParameterError(f"{_variable(item.name)} is {value}; it must be larger.", field=item.name)
        for name in ("http_port", "grpc_port"):
            if getattr(self, name) > 65_535:
                raise InvalidParameterError(
                    f"{_variable(name)} is {getattr(self, name)}; ports end at 65535.", field=name
                )
        if self.max_held_bytes < self.max_body_bytes:
            raise InvalidParameterError(
                f"{PREFIX}MAX_HELD_BYTES is {self.max_held_bytes}, less than one request may have "
                f"({PREFIX}MAX_BODY_BYTES, {self.max_body_bytes}); raise it.",
                field="max_held_bytes",
            )
        if self.http_port == self.grpc_port:
            raise InvalidParameterError(
                f"HTTP and gRPC cannot share the port {self.http_port}; give {PREFIX}GRPC_PORT another.",
                field="grpc_port",
            )
        if bool(self.tls_certificate) != bool(self.tls_key) or (self.tls_client_ca and not self.tls_certificate):
            raise InvalidParameterError(
                f"TLS needs both {PREFIX}TLS_CERTIFICATE and {PREFIX}TLS_KEY; {PREFIX}TLS_CLIENT_CA needs them too.",
                field="tls_certificate",
            )
        if not self.bundles and not self.repository:
            raise InvalidParameterError(f"{PREFIX}BUNDLE names no directory.", field="bundle")

    @property
    def bundles(self) -> tuple[Path, ...]:
        """The bundle directories."""
        if not self.bundle:
            return () if self.repository else (DEFAULT_BUNDLE,)
        return tuple(Path(part) for part in self.bundle.split(os.pathsep) if part)

    @property
    def batch_tokens(self) -> int:
        """Padded tokens of one batch."""
        return self.max_batch_tokens or (4096 if self.device == "cpu" else MAX_TOKENS)

    @property
    def chunk_bytes(self) -> int:
        """Bytes that one message of a stream may have: so few that all in progress fit into one request."""
        return min(self.max_chunk_bytes, self.max_body_bytes // (self.stream_chunks + 2))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Settings of this process.

        Raises
        ------
        InvalidParameterError
            A value that is no number where one is needed, or outside its range. An unset or empty variable means the
            default.
        """
        environ = os.environ if environ is None else environ
        given: dict[str, str | int] = {}
        for item in fields(cls):
            text = environ.get(_variable(item.name), "")
            if not text:
                continue
            if isinstance(item.default, int):
                try:
                    given[item.name] = int(text)
                except ValueError as error:
                    raise InvalidParameterError(
                        f"{_variable(item.name)} is {text!r}; a whole number is needed.", field=item.name
                    ) from error
            else:
                given[item.name] = text
        return cls(**given)  # type: ignore[arg-type]

    def to_env(self) -> dict[str, str]:
        """The environment from which :meth:`from_env` reads these settings."""
        return {_variable(item.name): str(getattr(self, item.name)) for item in fields(self)}


def _variable(name: str) -> str:
    return PREFIX + name.upper()
