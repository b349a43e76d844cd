import pisa_d2  # noqa: F401  # isort: skip  (before detectron2: it patches 0.6)
