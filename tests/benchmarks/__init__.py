"""Measurements that are run by hand: scripts, and not tests."""
