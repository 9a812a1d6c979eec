"""Uploaded .h5ad files: checked before they are read, and read by a process of their own.

It may import the library, the settings, the limits, and the requests that a file can make; no transport and no model.
"""
