"""Rank tables for Ascend NPUs: made from what a host's tools say, merged, checked, written in the published forms.

Needs the standard library alone, so that a host can run it without anything else of this project.
"""
