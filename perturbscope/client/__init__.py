"""Clients of a PerturbScope server, over HTTP and gRPC, blocking and asynchronous; all give the same answers.

The package imports cells, inference, protocol and the results of scoring.

::

    with Client("http://localhost:3000") as client:
        embeddings = client.embed_cells(cells, progress=bar.update)
        scores = client.score(embeddings.values, labels, control="non-targeting")

    async with AsyncGrpcClient("localhost:3001") as client:
        embeddings = await client.embed_cells(cells)
        async for part in client.embed_stream(chunks):  # any number of cells, a few chunks of them in memory
            ...

A server with API keys and TLS::

    Client("https://host:3000", api_key=..., ca="authority.pem")
    GrpcClient("grpcs://host:3001", ca="authority.pem", cert=("client.pem", "client.key"))

Credentials that are left out are taken from the environment, for instance ``PERTURBSCOPE_API_KEY``; see
:mod:`perturbscope.client.access`.

The errors are those of :mod:`perturbscope.errors`, which the library also raises without a server. Overload and a
server that cannot be reached are retried; see :class:`RetryPolicy`.
"""

from perturbscope.client.conversation import ChunkLimits, RetryPolicy
from perturbscope.client.grpc import AsyncGrpcClient, GrpcClient
from perturbscope.client.http import AsyncClient, Client

__all__ = ["AsyncClient", "AsyncGrpcClient", "ChunkLimits", "Client", "GrpcClient", "RetryPolicy"]
