"""Engines without a trainer: how they are started, and how their latency curve is measured."""
