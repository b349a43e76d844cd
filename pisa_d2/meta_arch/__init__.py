from .retinanet import PISARetinaNet

__all__ = ["PISARetinaNet"]
