import pisa_d2  # noqa: F401  # isort: skip  (Detectron2 0.6 cannot be imported before it)

from hypothesis import settings

# The same examples on every run and machine.
settings.register_profile("pisa_d2", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("pisa_d2")
