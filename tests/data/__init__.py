"""A package, since tests/test_regions.py has the name of a file in it."""
