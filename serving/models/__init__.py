"""The models that are served: found in folders, loaded, checked, leased to requests, replaced and unloaded.

It may import the library, the queue, the settings and telemetry; requests and transports are none of its business.
"""
