"""The checks that every call passes first: keys, rights, rates, memory and deadlines; and TLS.

Its modules import call, settings, queue and telemetry, and nothing else of the server.
"""
