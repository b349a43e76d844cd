from pisa_d2 import PISAROIHeads

from .faster_rcnn_R_18_FPN import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads._target_ = PISAROIHeads
train.output_dir = "output/digits/lazy_pisa_faster_rcnn_R_18_FPN"
