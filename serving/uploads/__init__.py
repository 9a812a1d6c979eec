"""Uploaded files: checked before they are read, and read by a process of their own."""
