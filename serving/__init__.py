"""The student in a service, and the page in the browser. May import lib and common.py, no stage."""
