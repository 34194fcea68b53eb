"""The token world: a generated token is one choice of the policy."""

from __future__ import annotations
