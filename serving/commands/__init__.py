"""The commands of ``python -m serving``: serve, keys, healthcheck, and the checks before the server starts.

They may import any room of the server; only :mod:`serving.service` imports them, for the checks.
"""
