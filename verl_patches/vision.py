"""Vision models of verl 0.9.1, for rows and ranks without images."""

from __future__ import annotations
