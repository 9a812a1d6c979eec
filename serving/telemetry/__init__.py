"""The log, the Prometheus metrics and the OpenTelemetry traces of the server.

Its modules import :mod:`serving.call` and :mod:`serving.settings`, and nothing else of the server.
"""
