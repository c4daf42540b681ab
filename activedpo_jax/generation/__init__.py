"""Responses from a decoder."""
