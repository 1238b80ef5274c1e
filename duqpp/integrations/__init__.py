"""Thin adapters to other libraries, each importing its host when it is used."""
