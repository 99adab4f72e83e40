"""Requests and responses: settings in headers, bounds, the outcome reported."""
