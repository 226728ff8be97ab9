"""Repair after cutting."""
