"""Bridges to the frameworks that run compressed models. They know everything below them; nothing knows them."""
