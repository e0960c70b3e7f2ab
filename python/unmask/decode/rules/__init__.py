"""Decoding rules: one class per rule of decode/table.py, which turns statistics into arguments of the commit op, on the device."""
