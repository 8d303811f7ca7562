"""Fixtures: loopback hosts, and processes that load from them."""
from loopback import hosts, start_client  # noqa: F401
