from pisa_d2 import PISAROIHeads

from .faster_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads._target_ = PISAROIHeads
train.output_dir = "output/coco/lazy_pisa_faster_rcnn_R_50_FPN_1x"
