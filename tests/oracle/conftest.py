"""Tests against transformers, which is not a dependency: where it is not installed they are skipped, and say so."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Whether bytes are durable is tested elsewhere; here it would be half of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
