"""The student in a service and on a page, people's labels. May import lib and common.py, no stage."""
