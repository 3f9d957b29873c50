"""Adapters on the Hub: model cards and pushing."""
