from pisa_d2 import PISARetinaNet

from .retinanet_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model._target_ = PISARetinaNet
train.output_dir = "output/coco/lazy_pisa_retinanet_R_50_FPN_1x"
