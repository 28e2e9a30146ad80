"""What the scripts stand on. A room imports rooms of floors below its own: stages; then tables and
models.py; then common.py; then inputs; then results. tests/test_house.py holds the order."""
