"""Settings of the server, from the environment."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from perturbscope import container
from perturbscope.errors import InvalidParameterError, near
from perturbscope.inference.encoder import Device
from perturbscope.inference.gpu import MAX_TOKENS

PREFIX = "PERTURBSCOPE_"
NOT_OF_THE_SERVER = (
    *("API_KEY", "API_KEY_FILE", "CA", "CLIENT_CERTIFICATE", "CLIENT_KEY"),  # perturbscope.client
    "DEBUG",  # perturbscope.cli
    *("BROWSER", "TRIAL"),  # tests and benchmarks
)
"""Variables with the prefix, without it here, that other programs of this project read."""
_SERVICE_LINK = re.compile(r"(\w+?)_(SERVICE|PORT)(_\w+)?", re.ASCII)
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+:\d+", re.ASCII)
Format = Literal["auto", "json", "text"]
"""Forms of the log."""
Level = Literal["debug", "info", "warning", "error"]
"""Levels of the log."""
_MAY_BE_ZERO = (
    *("threads", "repository_poll", "max_model_bytes", "max_batch_tokens", "connection_age", "drain_delay"),
    "max_reader_bytes",
)
_HOST = re.compile(r"\*|(\*\.)?[\w-]+(\.[\w-]+)*|\[?[0-9a-f:]*:[0-9a-f:.]*\]?", re.ASCII | re.IGNORECASE)
"""Pattern of a name or address in ``allowed_hosts``."""
ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds ``serving/`` and ``bundles/``: the checkout, or the image's."""
BUNDLES = ROOT / "bundles"
"""The repository of a server whose settings name neither a bundle nor a repository."""
DEFAULT_BUNDLE = BUNDLES / "default"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the server runs. Field `x` is read from the environment variable ``PERTURBSCOPE_X``.

    Raises
    ------
    InvalidParameterError
        A value is outside its range, or two contradict each other.
    """

    bundle: str = ""
    """Bundle directories, separated by ``:``; the first one is the default model, and without any of them the server is
    not ready. Empty: those of the repository alone."""
    repository: str = ""
    """Directory of bundle directories that may be added, changed and removed while the server runs. If the settings
    name no bundle, the one called default is the default model, or else the first by name. Empty: none if a bundle is
    named, otherwise ``bundles/`` beside ``serving/``."""
    repository_poll: int = 10
    """Seconds between two scans of the repository; 0: models are loaded and unloaded only on request."""
    max_model_bytes: int = 0
    """Estimated bytes of memory that all loaded models may take; 0: no limit."""
    signers: str = ""
    """Files of public keys (PEM) that are trusted to sign bundles, or folders of them, separated by ``:``; each is
    named by its file. Empty: signatures are not checked."""
    require_signatures: str = "no"
    """yes: only bundles with a signature of a trusted signer are served; no: the descriptions of models say what is
    known of their signatures."""
    variant: str = "fp32"
    """Graph of the bundle: fp32, fp16, fp16-flash, int8. On a CPU, int8 gives 1.3 to 1.5 times as many cells a second
    for the default model, at cosines of 0.9992 or more to fp32; docs/clients.md has the numbers."""
    device: str = "cpu"
    """Device of the models: cpu, cuda or tensorrt; there is no fallback from one to another."""
    engine_cache: str = ""
    """Directory where TensorRT keeps its engines, each of which takes minutes to build; empty: they are not kept."""
    threads: int = 0
    """CPU threads of the model; 0: the cores that the process may use."""
    host: str = "127.0.0.1"
    """Address that the HTTP and gRPC servers listen on; the container image sets 0.0.0.0."""
    keys: str = ""
    """File of API keys, made by ``python -m serving keys``; empty: requests need no key."""
    tls_certificate: str = ""
    """File with the server's certificate chain (PEM), for HTTP and gRPC; empty: no TLS."""
    tls_key: str = ""
    """File with the certificate's private key (PEM)."""
    tls_client_ca: str = ""
    """File with the authorities (PEM) that sign clients' certificates; empty: clients need no certificate."""
    allowed_hosts: str = ""
    """Names of this server, separated by commas, that HTTP requests may ask for in their Host header, and pages that
    browsers may send them from; ``*.example.org`` is every name below, ``*`` any name. Addresses are always allowed.
    Empty: with keys or TLS any name; without them only names that no stranger can register, and on a loopback address
    only those of this machine."""
    trusted_proxies: str = ""
    """Addresses and networks of proxies, separated by commas, whose X-Forwarded-For and X-Forwarded-Proto are believed;
    empty: nobody's."""
    http_port: int = 3000
    """Port of the HTTP server."""
    grpc_port: int = 3001
    """Port of the gRPC server."""
    max_cells: int = 20_000
    """Cells that one request may have embedded."""
    max_vectors: int = 200_000
    """Rows of the embeddings that one score request may bring."""
    max_genes: int = 100_000
    """Genes (columns) of one count matrix."""
    max_values: int = 200_000_000
    """Stored counts of one matrix; bounds what a compressed upload can grow to."""
    max_body_bytes: int = 256 * 2**20
    """Bytes of one request body, over HTTP and gRPC."""
    body_timeout: int = 300
    """Seconds within which a request body must arrive."""
    head_timeout: int = 30
    """Seconds within which an HTTP client must send the head of a request, and a gRPC client finish its handshake."""
    connection_age: int = 1800
    """Seconds, a tenth more or less, after which a connection takes no further requests, so that its client connects
    anew, and to new replicas; requests and streams in progress are finished. 0: connections may grow old."""
    file_timeout: int = 120
    """Seconds within which an uploaded file must be read; a damaged one can keep libhdf5 busy for ever."""
    stream_chunks: int = 4
    """Chunks of one stream that are in progress at a time; the next one is read when an answer has been taken."""
    max_chunk_bytes: int = 32 * 2**20
    """Bytes of one chunk of a stream. All chunks in progress of a stream together stay below max_body_bytes."""
    request_timeout: int = 3600
    """Seconds after which an HTTP request is answered with 504; over gRPC the caller's deadline holds."""
    max_json_bytes: int = 32 * 2**20
    """Bytes of one JSON body; JSON takes ten times the memory and time of the other formats."""
    max_held_bytes: int = 2**30
    """Bytes of memory that all requests in progress may hold: their bodies and, as estimated, the decoded data, tokens,
    vectors and encoded answers. Unset, it is a quarter of what a container below 4 GiB has."""
    max_reader_bytes: int = 0
    """Bytes of memory that the processes that read uploaded files may take together; 0: what the container, or the
    machine, has beside the server and ``max_held_bytes``, less an eighth."""
    max_requests: int = 256
    """Requests in progress at a time, over HTTP and gRPC together."""
    max_queued_tokens: int = 4_194_304
    """Tokens that may wait for a model; 2,048 cells of 2,048 tokens."""
    max_batch_tokens: int = 0
    """Padded tokens of one batch; a small request waits for two batches at most. 0: 4,096 on a CPU, where more gains
    nothing, and 65,536 on an accelerator."""
    inference_timeout: int = 120
    """Seconds after which a forward pass counts as hung: callers get an error, and the model is not ready."""
    max_permutations: int = 100_000
    """Permutations and null draws that one score request may ask for."""
    max_score_seconds: int = 600
    """Seconds of one core that a score, comparison or report may take, as estimated before it begins. Scores take
    turns, so a long one delays others little."""
    max_pairs: int = 100_000
    """Pairs of perturbations that one request may compare: all pairs of 447."""
    max_group_cells: int = 5_000
    """Largest max_cells, cells of one group, that a score request may ask for; memory grows with its square."""
    score_workers: int = 1
    """Score requests computed at a time."""
    drain_delay: int = 0
    """Seconds after SIGTERM during which requests are still taken while the health probes are red already, so that
    balancers stop sending; the container image sets 5. SIGINT (Ctrl+C) does not wait."""
    shutdown_grace: int = 30
    """Seconds that requests in progress have to finish at shutdown."""
    log_format: str = "auto"
    """Form of the log: json, text, or auto (text on a terminal, JSON elsewhere)."""
    log_level: str = "info"
    """Lowest level that is logged: debug, info, warning or error."""

    def __post_init__(self) -> None:
        if self.device not in get_args(Device):
            raise InvalidParameterError(
                f"{PREFIX}DEVICE is {self.device!r}; it must be one of {', '.join(get_args(Device))}.", field="device"
            )
        for name, allowed in (
            ("log_format", get_args(Format)),
            ("log_level", get_args(Level)),
            ("require_signatures", ("no", "yes")),
        ):
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
        for name in self.hosts:
            if not _HOST.fullmatch(name):
                raise InvalidParameterError(
                    f"{PREFIX}ALLOWED_HOSTS holds {name!r}, which is no host name; give names without scheme and port, "
                    "such as cells.example.org, *.example.org or *, separated by commas.",
                    field="allowed_hosts",
                )
        for name in self.proxies:
            try:
                ipaddress.ip_network(name)
            except ValueError as error:
                raise InvalidParameterError(
                    f"{PREFIX}TRUSTED_PROXIES holds {name!r}: {error}. Give addresses or networks, such as 10.0.0.7 or "
                    "10.0.0.0/8, separated by commas.",
                    field="trusted_proxies",
                ) from error
        if self.require_signatures == "yes" and not self.signers:
            raise InvalidParameterError(
                f"{PREFIX}REQUIRE_SIGNATURES is yes, and {PREFIX}SIGNERS names no public key: nothing could be served.",
                field="signers",
            )
        if self.bundle and not self.bundles:
            raise InvalidParameterError(f"{PREFIX}BUNDLE names no directory.", field="bundle")

    @property
    def bundles(self) -> tuple[Path, ...]:
        """The bundle directories that the settings name."""
        return tuple(Path(part) for part in self.bundle.split(os.pathsep) if part)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names in ``allowed_hosts``, in lower case."""
        return _listed(self.allowed_hosts.lower())

    @property
    def proxies(self) -> tuple[str, ...]:
        """The addresses and networks in ``trusted_proxies``."""
        return _listed(self.trusted_proxies)

    @property
    def repository_path(self) -> Path | None:
        """The directory of bundle directories; None: only the named bundles are served."""
        if self.repository:
            return Path(self.repository)
        return None if self.bundle else BUNDLES

    @property
    def batch_tokens(self) -> int:
        """Padded tokens of one batch."""
        return self.max_batch_tokens or (4096 if self.device == "cpu" else MAX_TOKENS)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one message of a stream: few enough that all chunks in progress fit into max_body_bytes."""
        return min(self.max_chunk_bytes, self.max_body_bytes // (self.stream_chunks + 2))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Return the settings of this process. An unset or empty variable means the default.

        Raises
        ------
        InvalidParameterError
            A value is no number where one is needed, or is outside its range; or a variable has the prefix and is not
            a setting.
        """
        environ = os.environ if environ is None else environ
        _check_names(environ, [item.name for item in fields(cls)])
        values: dict[str, str | int] = {}
        for item in fields(cls):
            text = environ.get(_variable(item.name), "")
            if not text or _is_address_of_a_service(item.name, text):
                continue
            if isinstance(item.default, int):
                try:
                    values[item.name] = int(text)
                except ValueError as error:
                    raise InvalidParameterError(
                        f"{_variable(item.name)} is {text!r}; a whole number is needed.", field=item.name
                    ) from error
            else:
                values[item.name] = text
        if "max_held_bytes" not in values:
            body = int(values.get("max_body_bytes", cls.max_body_bytes))
            values["max_held_bytes"] = max(body, min(cls.max_held_bytes, container.memory() // 4))
        return cls(**values)  # type: ignore[arg-type]

    def to_env(self) -> dict[str, str]:
        """The environment from which :meth:`from_env` reads these settings."""
        return {_variable(item.name): str(getattr(self, item.name)) for item in fields(self)}


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _is_address_of_a_service(name: str, text: str) -> bool:
    """Whether Kubernetes set a port, which is then not meant for this server.

    Pods beside a Service called perturbscope-http get PERTURBSCOPE_HTTP_PORT=tcp://10.0.0.11:3000.
    """
    return name.endswith("_port") and _SERVICE_ADDRESS.fullmatch(text) is not None


def _check_names(environ: Mapping[str, str], known: Iterable[str]) -> None:
    """Refuse variables that have the prefix and that nothing of this project reads."""
    names = {name.upper() for name in known}
    for variable, value in environ.items():
        name = variable.removeprefix(PREFIX)
        if name == variable or not value or name in names or name in NOT_OF_THE_SERVER:
            continue
        if _is_service_link(variable, environ):
            continue
        close = sorted(other for other in names if name in other)[:3] or near(name, names)
        remedy = f"Is {' or '.join(PREFIX + other for other in close)} meant? " if close else ""
        raise InvalidParameterError(
            f"The environment variable {variable} is not a setting of the server. {remedy}Correct its name, or unset "
            "it; serving/settings.py lists all settings.",
            field=name.lower(),
        )


def _is_service_link(variable: str, environ: Mapping[str, str]) -> bool:
    """Whether Kubernetes set a variable because a Service of the namespace is called ``perturbscope`` or alike.

    Examples: PERTURBSCOPE_SERVICE_HOST, PERTURBSCOPE_PORT=tcp://10.0.0.1:3000, PERTURBSCOPE_PORT_3000_TCP.
    """
    match = _SERVICE_LINK.fullmatch(variable)
    if match is None or f"{match[1]}_SERVICE_HOST" not in environ:
        return False
    return match[2] == "SERVICE" or match[3] is not None or "://" in environ[variable]
