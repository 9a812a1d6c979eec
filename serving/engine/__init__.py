"""The operations of the server, for both transports: embed, stream, score, compare, report, and how they fail.

Its modules import access, models, queue and telemetry, and neither a transport nor an upload.
"""
