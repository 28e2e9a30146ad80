"""The student in a service, and at a shell. May import lib and common.py, no stage."""
