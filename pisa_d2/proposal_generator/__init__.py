from .rpn import PISARPN

__all__ = ["PISARPN"]
